"""Comparison of training runs: data, plots, tables and an HTML page."""
