"""Parallelism, applied to the plain model from outside."""
