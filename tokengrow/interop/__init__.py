"""Conversion from and to the GPT-NeoX and Hugging Face formats."""
