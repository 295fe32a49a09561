"""Growth of depth: new blocks between the old ones, or after them.

identity: a block adds `attention(norm(x))` and `ffn(norm(x))` to the residual stream. With zero
values in the output projection and in the FFN it adds exactly zero. Every other tensor of a new
block is a slightly perturbed copy of an old block, because two exact copies would have the same
gradients forever.

stack: exact copies of old blocks, which change the function (Du et al., arXiv 2405.15319).

`docs/growing.md` has the arguments. Shapes: `L` layers before, `L'` after.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tokengrow.checkpoint.tensors import StateDict
from tokengrow.growth.config import GrowthConfig, NewBlockPlace
from tokengrow.growth.tensors import block_names, generator_for, normal_like, writes_to_residual
from tokengrow.model.config import ModelConfig


def block_origins(
    source: ModelConfig, target: ModelConfig, place: NewBlockPlace
) -> list[tuple[int, bool]]:
    """Return (source block, whether it is the original) for each block of the target.

    Args:
        source: config before.
        target: config after.
        place: `spread`: source block i is at the first t with floor(t L / L') = i, and its copies
            follow it; `top`: copies of all blocks in order, repeated, after the last source block.
    """
    layers = range(target.layers)
    if place == "top":
        return [(layer % source.layers, layer < source.layers) for layer in layers]
    old = [layer * source.layers // target.layers for layer in layers]
    return [(block, layer == 0 or old[layer - 1] != block) for layer, block in enumerate(old)]


def grow_depth(
    state: StateDict, source: ModelConfig, target: ModelConfig, config: GrowthConfig, seed: int
) -> StateDict:
    """Insert new blocks among the old ones.

    Args:
        state: weights of the source, or some of them, on the CPU; not modified.
        source: config before.
        target: config after; differs only in `layers`.
        config: `new_blocks` is the initialisation of new blocks, `new_block_place` their position.
            `new_value_scale` is the size of the perturbation of an identity block, relative to the
            root mean square of each tensor.
        seed: seed of the perturbations.

    Returns:
        The grown weights; old blocks, under their new numbers, are shared with `state`.
    """

    def copy(name: str, old: Tensor) -> Tensor:
        if config.new_blocks == "stack":
            return old.clone()
        if writes_to_residual(name):
            return torch.zeros_like(old)
        scale = config.new_value_scale
        return old + normal_like(old, tuple(old.shape), scale, generator_for(seed, name))

    return _renumber_blocks(state, block_origins(source, target, config.new_block_place), copy)


def grow_depth_moments(
    moments: StateDict, source: ModelConfig, target: ModelConfig, config: GrowthConfig, power: int
) -> StateDict:
    """Renumber the moments of old blocks and set those of new blocks to zero.

    Args:
        moments: one of Adam's slots, or some of its tensors, named like the weights; not modified.
        source: config before.
        target: config after.
        config: growth settings.
        power: power of the gradient in this slot; unused, because all slots follow one rule.
    """
    origins = block_origins(source, target, config.new_block_place)
    return _renumber_blocks(moments, origins, lambda _, old: torch.zeros_like(old))


def _renumber_blocks(
    state: StateDict, origins: list[tuple[int, bool]], copy: Callable[[str, Tensor], Tensor]
) -> StateDict:
    """Move every block to its new position and fill new blocks with `copy(new name, old)`."""
    grown = {name: tensor for name, tensor in state.items() if not name.startswith("blocks.")}
    for layer, (old_layer, is_original) in enumerate(origins):
        for name, old_name in zip(block_names(layer), block_names(old_layer), strict=True):
            if old_name in state:
                old = state[old_name]
                grown[name] = old if is_original else copy(name, old)
    return grown
