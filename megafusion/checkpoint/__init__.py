"""Checkpoints: tensors by name, complete or not there, for any topology."""
