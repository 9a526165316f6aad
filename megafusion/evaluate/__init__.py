"""Figures that say whether a trained model is any good."""
