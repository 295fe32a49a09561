"""Growth by width: more channels in the residual stream.

A layer norm ignores a constant added to every channel, and channels that equal the mean of the
others change neither the mean nor the direction of the rest. So whatever writes into the residual
stream (embedding, values of output and ffn) gets new channels that hold the mean of its row. Then
every new channel is the mean, the norm gives [x / rho, 0] with rho = sqrt(D / D'), and what reads
the stream meets exact zeros there: its new key columns are free, and random so that the new
channels part. The final norm takes rho into its weight. Zeros in place of the mean would move the
mean and with it every other channel. `docs/growing.md` has the argument.

Shapes: `D` width before, `D'` after, `N` parameter tokens, `V` vocabulary.
"""

import math

import torch

from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.tensors import State, drawn_like, generator_for, role_and_part
from tokengrow.model.config import ModelConfig

READERS = ("query", "key", "value", "ffn")
"""Roles whose keys meet the residual stream."""
WRITERS = ("output", "ffn")
"""Roles whose values are added to it."""


def rescaled_eps(source: ModelConfig, width: int) -> dict[str, float]:
    """The epsilons that keep the norms what they are: the variance shrinks by D / D'.

    `l2_norm_gelu` ignores the scale of its input, and with it the epsilon of the block norms.
    """
    share = source.width / width
    eps = {"final_norm_eps": source.final_norm_eps * share}
    if source.activation != "l2_norm_gelu":
        eps["norm_eps"] = source.norm_eps * share
    return eps


def widen(
    state: State, source: ModelConfig, target: ModelConfig, config: GrowthConfig, seed: int
) -> State:
    """Appends channels to the residual stream.

    Args:
        state: weights of the source, or some of them, on the CPU, at least float32; not modified.
        source: config before.
        target: config after; differs in `width` and the epsilons alone.
        config: not used: new key columns are as large as the old ones, whose readers they
            join.
        seed: of the new key columns.

    Returns:
        The grown weights; tensors that do not grow are shared with `state`.
    """
    count = target.width - source.width
    grown = dict(state)
    for name, old in state.items():
        if _written(name):
            mean = old.double().mean(dim=1, keepdim=True).to(old.dtype)
            grown[name] = torch.cat((old, mean.expand(-1, count)), dim=1)
        elif _read(name):
            scale = _key_scale(source, target)
            new = drawn_like(old, (len(old), count), scale, generator_for(seed, name))
            grown[name] = torch.cat((old * scale, new), dim=1)
        elif name == "final_norm.weight":
            grown[name] = torch.cat((old * _rho(source, target), old.new_ones(count)))
        elif name == "final_norm.bias":
            grown[name] = torch.cat((old, old.new_zeros(count)))
    return grown


def widen_moments(
    moments: State, source: ModelConfig, target: ModelConfig, config: GrowthConfig, power: int
) -> State:
    """Zero moments for new channels; those of scaled entries are divided by the scale.

    The gradients of what reads the stream are the same after the growth. Of what writes into it
    only the sum of old and new channels' share is, so its moments are carried as they are.

    Args:
        moments: one of Adam's moments, or some of its tensors, named like the weights; not
            modified.
        source: config before.
        target: config after.
        config: not used: moments do not depend on how new entries are born.
        power: of the gradient in this moment: 1, 2, or 0 for what does not depend on it.
    """
    count = target.width - source.width
    grown = dict(moments)
    for name, old in moments.items():
        if _written(name) or name == "final_norm.bias":
            scale = 1.0
        elif _read(name):
            scale = _key_scale(source, target)
        elif name == "final_norm.weight":
            scale = _rho(source, target)
        else:
            continue
        new = old.new_zeros(*old.shape[:-1], count)
        grown[name] = torch.cat((old / scale**power, new), dim=-1)
    return grown


def _rho(source: ModelConfig, target: ModelConfig) -> float:
    return math.sqrt(source.width / target.width)


def _key_scale(source: ModelConfig, target: ModelConfig) -> float:
    """By which old key columns are multiplied: 1 where the scale of the input does not count."""
    return 1.0 if source.activation == "l2_norm_gelu" else _rho(source, target)


def _written(name: str) -> bool:
    """Whether it writes into the residual stream, [.., D]."""
    role, part = role_and_part(name)
    return name == "embedding.weight" or (role in WRITERS and part == "value")


def _read(name: str) -> bool:
    """Whether it reads the residual stream, [N, D]."""
    role, part = role_and_part(name)
    return role in READERS and part == "key"
