"""Private APIs and error messages of other libraries.

Everything here depends on details that a library does not promise to keep. Each entry names the
version it was checked with, and `tests/test_compat.py` fails when a new version changes it.
"""

import re

import torch


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error means that the memory of a device is too small.

    torch 2.13: the CUDA allocator raises `OutOfMemoryError`; the CPU allocator raises a
    RuntimeError, which only its message distinguishes.
    """
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def hydra_unknown_key(error: Exception) -> str | None:
    """Return the key of an override that the config does not have; None for other errors.

    hydra-core 1.3.2: ConfigCompositionException names the key only in its message.
    """
    match = re.search(r"Could not override '([^'@]+)", str(error))
    return match[1] if match else None


def hydra_ambiguous_override(error: Exception) -> tuple[str, str] | None:
    """Return key and value of a sweep without --multirun; None for other errors.

    hydra-core 1.3.2: ConfigCompositionException names them only in its message.
    """
    match = re.search(r"Ambiguous value for argument '([^=']+)=(.*)'", str(error))
    return (match[1], match[2]) if match else None


def omegaconf_missing_key(error: Exception) -> str | None:
    """Return the key of a mandatory value that was not given; None for other errors.

    omegaconf 2.3: an interpolation to a missing value raises InterpolationToMissingValueError or
    MissingMandatoryValue; only the message is common to both.
    """
    key: str | None = getattr(error, "full_key", None)
    return key if key and "Missing mandatory value" in str(error) else None
