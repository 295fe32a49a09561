"""Inspection of a checkpoint: contribution of its parameter tokens, tables and plots."""
