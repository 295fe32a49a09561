"""Names of the tensors of a model, and random new entries for them."""

import hashlib
import re

import torch
from torch import Tensor

from tokengrow.model.config import ROLES
from tokengrow.model.tokenformer import INIT_STD

WRITERS = ("output", "ffn")
"""Roles whose values are added to the residual stream."""

_PATTENTION = re.compile(r"blocks\.(\d+)\.(?:attention\.)?([a-z]+)\.(key|value)_param_tokens")


def pattention_name(layer: int, role: str, part: str) -> str:
    """Return the name of the `key` or `value` parameter tokens of a Pattention layer."""
    parent = "ffn" if role == "ffn" else f"attention.{role}"
    return f"blocks.{layer}.{parent}.{part}_param_tokens"


def role_and_part(name: str) -> tuple[str, str]:
    """Return the role of a parameter-token tensor, and `key` or `value`.

    For any other tensor, both strings are empty.
    """
    match = _PATTENTION.fullmatch(name)
    return (match[2], match[3]) if match else ("", "")


def writes_to_residual(name: str) -> bool:
    """Return whether a block adds the values in this tensor to the residual stream."""
    role, part = role_and_part(name)
    return role in WRITERS and part == "value"


def block_names(layer: int) -> list[str]:
    """Return the names of all tensors of a block."""
    return [pattention_name(layer, role, part) for role in ROLES for part in ("key", "value")]


def generator_for(seed: int, name: str) -> torch.Generator:
    """Return a random generator for one tensor, independent of draws for other tensors."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


def normal_like(
    old: Tensor, shape: tuple[int, ...], scale: float, generator: torch.Generator
) -> Tensor:
    """Draw normal numbers with `scale` times the root mean square of `old`.

    Args:
        old: reference for dtype and size. If all its entries are 0, the standard deviation is
            `INIT_STD`.
        shape: shape of the result.
        scale: standard deviation divided by the root mean square of `old`.
        generator: source of the random numbers.

    Returns:
        Tensor of the given shape, in the dtype of `old`.
    """
    rms = float(old.double().square().mean().sqrt())
    new = torch.empty(shape, dtype=torch.float64)
    return new.normal_(0.0, scale * rms or INIT_STD, generator=generator).to(old.dtype)
