"""Optimizer with growth-aware state, parameter groups and learning-rate schedules."""
