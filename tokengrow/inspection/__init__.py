"""Analysis of the parameter tokens of a checkpoint: figures, tables and plots."""
