"""Growth of width: more channels in the residual stream.

A layer norm ignores a constant added to every channel. Channels that equal the mean of the others
change neither the mean nor the direction of the rest. All tensors that write into the residual
stream (embedding, values of output and ffn) therefore get new channels that hold the mean of their
row. Every new channel then equals the mean, and the norm gives [x / rho, 0] with
rho = sqrt(D / D'). Tensors that read the stream meet exact zeros in the new channels, so their new
key columns are free. They are random, so that the new channels become different. The final norm
takes rho into its weight. Zeros in place of the mean would move the mean, and with it every other
channel. `docs/growing.md` has the argument.

Shapes: `D` width before, `D'` after, `N` parameter tokens, `V` vocabulary.
"""

import math

import torch

from tokengrow.checkpoint.tensors import StateDict
from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.tensors import (
    generator_for,
    normal_like,
    role_and_part,
    writes_to_residual,
)
from tokengrow.model.config import ModelConfig

READERS = ("query", "key", "value", "ffn")
"""Roles whose keys are multiplied by the residual stream."""


def rescaled_eps(source: ModelConfig, width: int) -> dict[str, float]:
    """Return the epsilons that keep the norms unchanged while the variance shrinks by D / D'.

    `l2_norm_gelu` ignores the scale of its input, so it does not need other block norms.
    """
    share = source.width / width
    eps = {"final_norm_eps": source.final_norm_eps * share}
    if source.activation != "l2_norm_gelu":
        eps["norm_eps"] = source.norm_eps * share
    return eps


def grow_width(
    state: StateDict, source: ModelConfig, target: ModelConfig, config: GrowthConfig, seed: int
) -> StateDict:
    """Append channels to the residual stream.

    Args:
        state: weights of the source, or some of them, on the CPU, at least float32; not modified.
        source: config before.
        target: config after; differs only in `width` and the epsilons.
        config: unused, because new key columns are as large as the old ones of the same tensor.
        seed: seed of the new key columns.

    Returns:
        The grown weights; tensors that do not grow are shared with `state`.
    """
    count = target.width - source.width
    grown = dict(state)
    for name, old in state.items():
        if _writes_stream(name):
            mean = old.double().mean(dim=1, keepdim=True).to(old.dtype)
            grown[name] = torch.cat((old, mean.expand(-1, count)), dim=1)
        elif _reads_stream(name):
            scale = _key_scale(source, target)
            new = normal_like(old, (len(old), count), scale, generator_for(seed, name))
            grown[name] = torch.cat((old * scale, new), dim=1)
        elif name == "final_norm.weight":
            grown[name] = torch.cat((old * _rho(source, target), old.new_ones(count)))
        elif name == "final_norm.bias":
            grown[name] = torch.cat((old, old.new_zeros(count)))
    return grown


def grow_width_moments(
    moments: StateDict, source: ModelConfig, target: ModelConfig, config: GrowthConfig, power: int
) -> StateDict:
    """Append zero moments for new channels and divide those of scaled entries by the scale.

    Gradients of tensors that read the stream are the same after the growth. For tensors that write
    into it, only the gradient of an old channel plus its share of those of the new channels is the
    same, so their moments are carried unchanged.

    Args:
        moments: one of Adam's moments, or some of its tensors, named like the weights; not
            modified.
        source: config before.
        target: config after.
        config: unused, because moments do not depend on the initialisation of new entries.
        power: power of the gradient in this moment: 1, 2, or 0 if it does not depend on it.
    """
    count = target.width - source.width
    grown = dict(moments)
    for name, old in moments.items():
        if _writes_stream(name) or name == "final_norm.bias":
            scale = 1.0
        elif _reads_stream(name):
            scale = _key_scale(source, target)
        elif name == "final_norm.weight":
            scale = _rho(source, target)
        else:
            continue
        new = old.new_zeros(*old.shape[:-1], count)
        grown[name] = torch.cat((old / scale**power, new), dim=-1)
    return grown


def _rho(source: ModelConfig, target: ModelConfig) -> float:
    """Return sqrt(D / D')."""
    return math.sqrt(source.width / target.width)


def _key_scale(source: ModelConfig, target: ModelConfig) -> float:
    """Return the factor of old key columns: 1 if the activation ignores the scale of its input."""
    return 1.0 if source.activation == "l2_norm_gelu" else _rho(source, target)


def _writes_stream(name: str) -> bool:
    """Return whether a tensor [.., D] writes into the residual stream."""
    return name == "embedding.weight" or writes_to_residual(name)


def _reads_stream(name: str) -> bool:
    """Return whether a tensor [N, D] reads the residual stream."""
    role, part = role_and_part(name)
    return role in READERS and part == "key"
