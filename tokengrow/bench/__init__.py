"""Measured speed next to baselines and the hardware limit."""
