"""The embedded picture-caption pack and its builder."""
