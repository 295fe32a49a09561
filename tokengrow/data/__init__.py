"""Data pipeline: text -> tokens -> ordered batches."""
