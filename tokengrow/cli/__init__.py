"""The cli room: the only place that knows Hydra. One file per verb."""
