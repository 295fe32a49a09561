"""Plan of a run before it starts: parameters, FLOPs, memory and time."""
