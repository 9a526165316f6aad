"""The model in plain PyTorch on one device; it knows nothing of parallelism."""
