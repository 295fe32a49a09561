"""The evaluation room: how good a model is, as tables and plots."""
