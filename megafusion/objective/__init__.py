"""Losses on text and images, the noise process, and its samplers."""
