"""Growth by heads: more of them, and longer ones.

New channels of a head, and new heads, mix into channels that the output projection does not read
yet: its new key columns are zero. Within an old head, new query channels are zero, so that its
scores stay; the old ones are multiplied by sqrt(C' / C), against the longer head's divisor. Keys
and values are random in all that is new. The rotated channels and their frequencies stay those of
the source. `docs/growing.md` has the argument.

Shapes: `H` heads and `C` head dim before, `H'` and `C'` after, `N` parameter tokens.
"""

import math

from torch import Tensor

from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.tensors import State, drawn_like, generator_for, role_and_part
from tokengrow.model.config import ModelConfig

MIXED = ("query", "key", "value")
"""Roles whose values are the channels of the heads."""


def add_heads(
    state: State, source: ModelConfig, target: ModelConfig, config: GrowthConfig, seed: int
) -> State:
    """Grows heads in number, in length, or both.

    Args:
        state: weights of the source, or some of them, on the CPU, at least float32; not modified.
        source: config before.
        target: config after; differs in `heads` and `head_dim` alone.
        config: not used: what is new in a projection is as large as what is old.
        seed: of what is new in the values of query, key and value.

    Returns:
        The grown weights; tensors that do not grow are shared with `state`.
    """
    grown = dict(state)
    for name, old in state.items():
        role, part = role_and_part(name)
        shape = (len(old), target.inner_dim)
        if (role, part) == ("output", "key"):
            grown[name] = _placed(old, old.new_zeros(shape), source, target)
        elif part == "value" and role in MIXED:
            new = drawn_like(old, shape, 1.0, generator_for(seed, name))
            if role == "query":
                new = _new_channels_of_old_heads_zero(new, source, target)
                old = old * query_scale(source, target)
            grown[name] = _placed(old, new, source, target)
    return grown


def add_head_moments(
    moments: State, source: ModelConfig, target: ModelConfig, config: GrowthConfig, power: int
) -> State:
    """Zero moments for what is new; those of the scaled query values are divided by the scale.

    Args:
        moments: one of Adam's moments, or some of its tensors, named like the weights; not
            modified.
        source: config before.
        target: config after.
        config: not used: moments do not depend on how new entries are born.
        power: of the gradient in this moment: 1, 2, or 0 for what does not depend on it.
    """
    grown = dict(moments)
    for name, old in moments.items():
        role, part = role_and_part(name)
        if (role, part) == ("output", "key") or (part == "value" and role in MIXED):
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
