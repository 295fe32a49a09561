"""Growth by heads: more of them, and longer ones.

New channels of a head, and new heads, mix into channels that the output projection does not read
yet: its new key columns are zero. Within an old head, new query channels are zero, so that its
scores stay; the old ones are multiplied by sqrt(C' / C), against the longer head's divisor. Keys
and values are random in all that is new. The rotated channels and their frequencies stay those of
the source. `docs/growing.md` has the argument.

Shapes: `H` heads and `C` head dim before, `H'` and `C'` after, `N` parameter tokens.
"""

import math

import torch
from torch import Tensor

from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.tensors import State, drawn_like, pattention_name
from tokengrow.model.config import ModelConfig


def add_heads(
    state: State,
    source: ModelConfig,
    target: ModelConfig,
    config: GrowthConfig,
    generator: torch.Generator,
) -> State:
    """Grows heads in number, in length, or both.

    Args:
        state: weights of the source, on the CPU, at least float32; not modified.
        source: config before.
        target: config after; differs in `heads` and `head_dim` alone.
        config: not used: what is new in a projection is as large as what is old.
        generator: of what is new in the values of query, key and value.

    Returns:
        The grown weights; tensors that do not grow are shared with `state`.
    """
    grown = dict(state)
    for layer in range(source.layers):
        for role in ("query", "key", "value"):
            name = pattention_name(layer, role, "value")
            old = state[name]
            new = drawn_like(old, (len(old), target.inner_dim), 1.0, generator)
            if role == "query":
                new = _new_channels_of_old_heads_zero(new, source, target)
                old = old * query_scale(source, target)
            grown[name] = _placed(old, new, source, target)
        name = pattention_name(layer, "output", "key")
        unread = state[name].new_zeros(len(state[name]), target.inner_dim)
        grown[name] = _placed(state[name], unread, source, target)
    return grown


def add_head_moments(moments: State, source: ModelConfig, target: ModelConfig, power: int) -> State:
    """Zero moments for what is new; those of the scaled query values are divided by the scale.

    Args:
        moments: one of Adam's moments, named like the weights; not modified.
        source: config before.
        target: config after.
        power: of the gradient in this moment, 1 or 2.
    """
    grown = dict(moments)
    parts = {"query": "value", "key": "value", "value": "value", "output": "key"}
    for layer in range(source.layers):
        for role, part in parts.items():
            name = pattention_name(layer, role, part)
            if name in moments:
                old = moments[name]
                scale = query_scale(source, target) if role == "query" else 1.0
                zeros = old.new_zeros(len(old), target.inner_dim)
                grown[name] = _placed(old / scale**power, zeros, source, target)
    return grown


def query_scale(source: ModelConfig, target: ModelConfig) -> float:
    """sqrt(C' / C): attention divides its scores by the root of the head dim."""
    return math.sqrt(target.head_dim / source.head_dim)


def _placed(old: Tensor, new: Tensor, source: ModelConfig, target: ModelConfig) -> Tensor:
    """`new` [N, H' C'] with `old` [N, H C] where the old heads' old channels lie."""
    rows = new.view(len(new), target.heads, target.head_dim).clone()
    old_heads = old.view(len(old), source.heads, source.head_dim)
    rows[:, : source.heads, : source.head_dim] = old_heads
    return rows.view(len(new), target.inner_dim)


def _new_channels_of_old_heads_zero(
    new: Tensor, source: ModelConfig, target: ModelConfig
) -> Tensor:
    rows = new.view(len(new), target.heads, target.head_dim).clone()
    rows[:, : source.heads] = 0
    return rows.view(len(new), target.inner_dim)
