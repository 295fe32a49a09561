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
from tokengrow.growth.tensors import State, drawn_like, pattention_name, with_columns
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
    state: State,
    source: ModelConfig,
    target: ModelConfig,
    config: GrowthConfig,
    generator: torch.Generator,
) -> State:
    """Appends channels to the residual stream.

    Args:
        state: weights of the source, on the CPU, at least float32; not modified.
        source: config before.
        target: config after; differs in `width` and the epsilons alone.
        config: not used: new key columns are as large as the old ones, whose readers they
            join.
        generator: of the new key columns.

    Returns:
        The grown weights; tensors that do not grow are shared with `state`.
    """
    count = target.width - source.width
    grown = dict(state)
    for name in _written(source):
        mean = state[name].double().mean(dim=1, keepdim=True)
        grown[name] = with_columns(state[name], mean.expand(-1, count))
    scale = _key_scale(source, target)
    for name in _read(source):
        new = drawn_like(state[name], (len(state[name]), count), scale, generator)
        grown[name] = with_columns(state[name] * scale, new)
    weight, bias = state["final_norm.weight"], state["final_norm.bias"]
    grown["final_norm.weight"] = torch.cat((weight * _rho(source, target), weight.new_ones(count)))
    grown["final_norm.bias"] = torch.cat((bias, bias.new_zeros(count)))
    return grown


def widen_moments(moments: State, source: ModelConfig, target: ModelConfig, power: int) -> State:
    """Zero moments for new channels; those of scaled entries are divided by the scale.

    The gradients of what reads the stream are the same after the growth. Of what writes into it
    only the sum of old and new channels' share is, so its moments are carried as they are.

    Args:
        moments: one of Adam's moments, named like the weights; not modified.
        source: config before.
        target: config after.
        power: of the gradient in this moment, 1 or 2.
    """
    grown = dict(moments)
    scales = dict.fromkeys(_written(source), 1.0)
    scales |= dict.fromkeys(_read(source), _key_scale(source, target))
    scales |= {"final_norm.weight": _rho(source, target), "final_norm.bias": 1.0}
    for name, scale in scales.items():
        if name in moments:
            old = moments[name]
            new = old.new_zeros(*old.shape[:-1], target.width - source.width)
            grown[name] = torch.cat((old / scale**power, new), dim=-1)
    return grown


def _rho(source: ModelConfig, target: ModelConfig) -> float:
    return math.sqrt(source.width / target.width)


def _key_scale(source: ModelConfig, target: ModelConfig) -> float:
    """By which old key columns are multiplied: 1 where the scale of the input does not count."""
    return 1.0 if source.activation == "l2_norm_gelu" else _rho(source, target)


def _written(config: ModelConfig) -> list[str]:
    """Names of what writes into the residual stream, each [.., D]."""
    layers = range(config.layers)
    names = [pattention_name(layer, role, "value") for layer in layers for role in WRITERS]
    return ["embedding.weight", *names]


def _read(config: ModelConfig) -> list[str]:
    """Names of what reads the residual stream, each [N, D]."""
    layers = range(config.layers)
    return [pattention_name(layer, role, "key") for layer in layers for role in READERS]
