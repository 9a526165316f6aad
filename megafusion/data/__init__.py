"""Sharded streams of packed sequences, with state."""
