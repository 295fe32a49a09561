"""Pattention kernels: the operator, its implementations and the loss of the output head."""
