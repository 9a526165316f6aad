"""Memory, step time and cost of a run on some GPUs, predicted by arithmetic."""
