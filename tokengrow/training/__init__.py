"""Training of a ladder: configuration, loop, stages, resuming, checkpoints, wall time."""
