"""Metric loggers and throughput of a training run."""
