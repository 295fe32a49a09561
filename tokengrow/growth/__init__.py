"""Growth of a model: plans, operators per axis, optimizer state, verification and pruning.

All functions are pure and work on state dicts on the CPU.
"""
