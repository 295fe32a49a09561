"""Growth by depth: new blocks between the old ones, or behind them.

identity: a block adds `attention(norm(x))` and `ffn(norm(x))` to the residual stream. With zero
values in the output projection and in the FFN it adds nothing, bit for bit. Everything else in it
is a copy of an old block, moved a little: two copies of one block would have the same gradients for
ever.

stack: whole copies, which are another function (Du et al., arXiv 2405.15319).

`docs/growing.md` has the arguments. Shapes: `L` layers before, `L'` after.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.tensors import (
    State,
    block_names,
    drawn_like,
    generator_for,
    role_and_part,
)
from tokengrow.model.config import ModelConfig

ADDING = (("output", "value"), ("ffn", "value"))
"""What a block adds to the residual stream with: zero in a new one."""


def origins(source: ModelConfig, target: ModelConfig, place: str) -> list[tuple[int, bool]]:
    """(old block, whether it is that block itself) for each block of the target.

    Args:
        source: config before.
        target: config after.
        place: `spread`: old block i stands at the first t with floor(t L / L') = i, the others
            behind it are copies; `top`: copies of all blocks in their order, again and again,
            behind the last one.
    """
    layers = range(target.layers)
    if place == "top":
        return [(layer % source.layers, layer < source.layers) for layer in layers]
    old = [layer * source.layers // target.layers for layer in layers]
    return [(block, layer == 0 or old[layer - 1] != block) for layer, block in enumerate(old)]


def deepen(
    state: State, source: ModelConfig, target: ModelConfig, config: GrowthConfig, seed: int
) -> State:
    """Puts new blocks among the old ones.

    Args:
        state: weights of the source, or some of them, on the CPU; not modified.
        source: config before.
        target: config after; differs in `layers` alone.
        config: `new_blocks` says what they are, `new_block_place` where; `new_value_scale` how
            far an identity is moved from the block that it copies, as a share of the root mean
            square of each tensor.
        seed: of these moves.

    Returns:
        The grown weights; old blocks, under their new numbers, are shared with `state`.
    """

    def copy(name: str, old: Tensor) -> Tensor:
        if config.new_blocks == "stack":
            return old.clone()
        if role_and_part(name) in ADDING:
            return torch.zeros_like(old)
        scale = config.new_value_scale
        return old + drawn_like(old, tuple(old.shape), scale, generator_for(seed, name))

    return _renumbered(state, origins(source, target, config.new_block_place), copy)


def deepen_moments(
    moments: State, source: ModelConfig, target: ModelConfig, config: GrowthConfig, power: int
) -> State:
    """The old blocks' moments under their new numbers, zeros for the new blocks.

    Args:
        moments: one of Adam's slots, or some of its tensors, named like the weights; not modified.
        source: config before.
        target: config after.
        config: of the growth.
        power: of the gradient in this slot; here the rule is the same for all.
    """
    places = origins(source, target, config.new_block_place)
    return _renumbered(moments, places, lambda _, old: torch.zeros_like(old))


def _renumbered(
    state: State, places: list[tuple[int, bool]], copy: Callable[[str, Tensor], Tensor]
) -> State:
    """The tensors with every block at its new place, and `copy(new name, old)` in new blocks."""
    grown = {name: tensor for name, tensor in state.items() if not name.startswith("blocks.")}
    for layer, (old_layer, itself) in enumerate(places):
        for name, old_name in zip(block_names(layer), block_names(old_layer), strict=True):
            if old_name in state:
                old = state[old_name]
                grown[name] = old if itself else copy(name, old)
    return grown
