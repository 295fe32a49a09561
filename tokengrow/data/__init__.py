"""The data room: text -> tokens -> ordered batches."""
