"""MegaFusion: one transformer that writes text and draws images."""

__version__ = "0.1.0"
