"""Metrics of trained models: suites, the judge of generated images, and the report."""
