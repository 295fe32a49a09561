"""Private APIs and error messages of other libraries.

Everything here depends on details that a library does not promise to keep. Each entry names the
version it was checked with, and `tests/test_compat.py` fails when a new version changes it.
"""

import torch


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error means that the memory of a device is too small.

    torch 2.13: the CUDA allocator raises `OutOfMemoryError`; the CPU allocator raises a
    RuntimeError, which only its message distinguishes.
    """
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
