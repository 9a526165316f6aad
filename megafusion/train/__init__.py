"""The training step, the run around it, its checkpoints, averaged weights and metrics."""
