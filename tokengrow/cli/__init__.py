"""Command line: one module per verb; the only package that imports Hydra."""
