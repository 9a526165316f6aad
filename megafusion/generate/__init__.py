"""Text and pictures from a trained model: caches, samplers, the pipeline that a user calls."""
