"""What the operators of every axis need: named tensors, and new entries like the old ones."""

import hashlib
import re

import torch
from torch import Tensor

from tokengrow.model.config import ROLES
from tokengrow.model.tokenformer import INIT_STD

State = dict[str, Tensor]

_PATTENTION = re.compile(r"blocks\.(\d+)\.(?:attention\.)?([a-z]+)\.(key|value)_param_tokens")


def pattention_name(layer: int, role: str, part: str) -> str:
    """Name of a Pattention layer's `key` or `value` parameter tokens."""
    home = "ffn" if role == "ffn" else f"attention.{role}"
    return f"blocks.{layer}.{home}.{part}_param_tokens"


def role_and_part(name: str) -> tuple[str, str]:
    """The role of a tensor of parameter tokens, and whether it is `key` or `value`; two empty
    strings for any other tensor."""
    match = _PATTENTION.fullmatch(name)
    return (match[2], match[3]) if match else ("", "")


def block_names(layer: int) -> list[str]:
    """Names of every tensor of a block."""
    return [pattention_name(layer, role, part) for role in ROLES for part in ("key", "value")]


def rms(values: Tensor) -> float:
    """Root mean square of all entries."""
    return float(values.double().square().mean().sqrt())


def generator_for(seed: int, name: str) -> torch.Generator:
    """A stream of random numbers for one tensor, whatever was drawn for others before."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


def drawn_like(
    old: Tensor, shape: tuple[int, ...], scale: float, generator: torch.Generator
) -> Tensor:
    """Normal numbers of `scale` times the root mean square of `old`, in its dtype."""
    std = scale * rms(old) or INIT_STD  # entries that never moved have no scale of their own
    new = torch.empty(shape, dtype=torch.float64)
    return new.normal_(0.0, std, generator=generator).to(old.dtype)
