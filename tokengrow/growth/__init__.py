"""The growth room: how a model becomes a bigger one. Pure functions on CPU state dicts."""
