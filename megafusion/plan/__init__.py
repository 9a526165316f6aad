"""What a run would need and take on some GPUs, by arithmetic: memory, step time, cost. A plan is a prediction."""
