"""What the operators of every axis need: named tensors, and new entries like the old ones."""

import torch
from torch import Tensor

from tokengrow.model.config import ROLES
from tokengrow.model.tokenformer import INIT_STD

State = dict[str, Tensor]


def pattention_name(layer: int, role: str, part: str) -> str:
    """Name of a Pattention layer's `key` or `value` parameter tokens."""
    home = "ffn" if role == "ffn" else f"attention.{role}"
    return f"blocks.{layer}.{home}.{part}_param_tokens"


def block_names(layer: int) -> list[str]:
    """Names of every tensor of a block."""
    return [pattention_name(layer, role, part) for role in ROLES for part in ("key", "value")]


def rms(values: Tensor) -> float:
    """Root mean square of all entries."""
    return float(values.double().square().mean().sqrt())


def drawn_like(
    old: Tensor, shape: tuple[int, ...], scale: float, generator: torch.Generator
) -> Tensor:
    """Normal numbers of `scale` times the root mean square of `old`, in its dtype."""
    std = scale * rms(old) or INIT_STD  # entries that never moved have no scale of their own
    new = torch.empty(shape, dtype=torch.float64)
    return new.normal_(0.0, std, generator=generator).to(old.dtype)


def with_columns(old: Tensor, new: Tensor) -> Tensor:
    """[n, d] and [n, m] side by side, in the dtype of `old`."""
    return torch.cat((old, new.to(old.dtype)), dim=1)
