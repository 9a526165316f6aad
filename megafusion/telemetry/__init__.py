"""Metrics of a run: the metrics file, trackers, throughput, stragglers, status."""
