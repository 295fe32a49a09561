"""Sampling, text generation and the CUDA-graph decoder."""
