"""Sharded checkpoints of whole tensors by name, which any topology can load."""
