"""Models and their configs: single-device modules without I/O, Lightning or Hydra."""
