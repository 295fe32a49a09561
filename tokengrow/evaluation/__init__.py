"""Evaluation of a model: harness tasks, perplexity of text, and their result files."""
