"""Checkpoint schema, atomic store, and tensor files."""
