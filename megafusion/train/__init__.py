"""The training loop, its configuration, the run folder, checkpoints and samples."""
