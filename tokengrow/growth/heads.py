"""Growth of heads: more heads, and longer ones.

New heads, and new channels of old heads, mix into channels that the output projection does not read
yet, because its new key columns are zero. New query channels of an old head are zero, so its scores
stay the same. The old query channels are multiplied by sqrt(C' / C), because attention divides by
the root of the longer head dim. New keys and values are random. The rotated channels and their
frequencies are those of the source. `docs/growing.md` has the argument.

Shapes: `H` heads and `C` head dim before, `H'` and `C'` after, `N` parameter tokens.
"""

import math

from torch import Tensor

from tokengrow.checkpoint.tensors import StateDict
from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.tensors import generator_for, normal_like, role_and_part
from tokengrow.model.config import ModelConfig

HEAD_ROLES = ("query", "key", "value")
"""Roles whose values are the channels of the heads."""


def grow_heads(
    state: StateDict, source: ModelConfig, target: ModelConfig, config: GrowthConfig, seed: int
) -> StateDict:
    """Grow the number of heads, the head dim, or both.

    Args:
        state: weights of the source, or some of them, on the CPU, at least float32; not modified.
        source: config before.
        target: config after; differs only in `heads` and `head_dim`.
        config: unused, because new entries of a projection are as large as the old ones.
        seed: seed of the new values of query, key and value.

    Returns:
        The grown weights; tensors that do not grow are shared with `state`.
    """
    grown = dict(state)
    for name, old in state.items():
        role, part = role_and_part(name)
        shape = (len(old), target.inner_dim)
        if (role, part) == ("output", "key"):
            grown[name] = _insert_old_heads(old, old.new_zeros(shape), source, target)
        elif part == "value" and role in HEAD_ROLES:
            new = normal_like(old, shape, 1.0, generator_for(seed, name))
            if role == "query":
                new.view(len(new), target.heads, target.head_dim)[:, : source.heads] = 0
                old = old * query_scale(source, target)
            grown[name] = _insert_old_heads(old, new, source, target)
    return grown


def grow_heads_moments(
    moments: StateDict, source: ModelConfig, target: ModelConfig, config: GrowthConfig, power: int
) -> StateDict:
    """Append zero moments for new entries and divide those of scaled query values by the scale.

    Args:
        moments: one of Adam's moments, or some of its tensors, named like the weights; not
            modified.
        source: config before.
        target: config after.
        config: unused, because moments do not depend on the initialisation of new entries.
        power: power of the gradient in this moment: 1, 2, or 0 if it does not depend on it.
    """
    grown = dict(moments)
    for name, old in moments.items():
        role, part = role_and_part(name)
        if (role, part) == ("output", "key") or (part == "value" and role in HEAD_ROLES):
            scale = query_scale(source, target) if role == "query" else 1.0
            zeros = old.new_zeros(len(old), target.inner_dim)
            grown[name] = _insert_old_heads(old / scale**power, zeros, source, target)
    return grown


def query_scale(source: ModelConfig, target: ModelConfig) -> float:
    """Return sqrt(C' / C), which offsets the division of scores by the root of the head dim."""
    return math.sqrt(target.head_dim / source.head_dim)


def _insert_old_heads(old: Tensor, new: Tensor, source: ModelConfig, target: ModelConfig) -> Tensor:
    """Return `new` [N, H' C'] with `old` [N, H C] at the old channels of the old heads."""
    rows = new.view(len(new), target.heads, target.head_dim).clone()
    old_heads = old.view(len(old), source.heads, source.head_dim)
    rows[:, : source.heads, : source.head_dim] = old_heads
    return rows.view(len(new), target.inner_dim)
