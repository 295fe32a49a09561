"""Growth by depth: new blocks that are the identity.

A block adds `attention(norm(x))` and `ffn(norm(x))` to the residual stream. With zero values in the
output projection and in the FFN it adds nothing, bit for bit. Everything else in it is a copy of
the block before it, moved a little: two copies of one block would have the same gradients for ever.
The new blocks are spread evenly over the old ones. `docs/growing.md` has the argument.

Shapes: `L` layers before, `L'` after.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.tensors import State, block_names, drawn_like
from tokengrow.model.config import ModelConfig

ADDING = ("attention.output.value_param_tokens", "ffn.value_param_tokens")
"""What a block adds to the residual stream with: zero in a new one."""


def origins(source: ModelConfig, target: ModelConfig) -> list[tuple[int, bool]]:
    """(old block, whether it is that block itself) for each block of the target.

    Old block i stands at the first t with floor(t L / L') = i; the others behind it are copies.
    """
    old = [layer * source.layers // target.layers for layer in range(target.layers)]
    return [(block, layer == 0 or old[layer - 1] != block) for layer, block in enumerate(old)]


def deepen(
    state: State,
    source: ModelConfig,
    target: ModelConfig,
    config: GrowthConfig,
    generator: torch.Generator,
) -> State:
    """Puts identity blocks between the old ones.

    Args:
        state: weights of the source, on the CPU; not modified.
        source: config before.
        target: config after; differs in `layers` alone.
        config: `new_value_scale` says how far a copy is moved, as a share of the root mean square
            of each tensor.
        generator: of these moves.

    Returns:
        The grown weights; old blocks, under their new numbers, are shared with `state`.
    """

    def copy(name: str, old: Tensor) -> Tensor:
        if name.endswith(ADDING):
            return torch.zeros_like(old)
        return old + drawn_like(old, tuple(old.shape), config.new_value_scale, generator)

    return _renumbered(state, source, target, copy)


def deepen_moments(moments: State, source: ModelConfig, target: ModelConfig, power: int) -> State:
    """The old blocks' moments under their new numbers, zeros for the new blocks.

    Args:
        moments: one of Adam's slots, named like the weights; not modified.
        source: config before.
        target: config after.
        power: of the gradient in this slot; here the rule is the same for all.
    """
    return _renumbered(moments, source, target, lambda _, old: torch.zeros_like(old))


def _renumbered(
    state: State, source: ModelConfig, target: ModelConfig, copy: Callable[[str, Tensor], Tensor]
) -> State:
    """The tensors with every block at its new place, and `copy(name, old)` in new blocks."""
    blocks = {name for layer in range(source.layers) for name in block_names(layer)}
    grown = {name: tensor for name, tensor in state.items() if name not in blocks}
    for layer, (old_layer, itself) in enumerate(origins(source, target)):
        for name, old_name in zip(block_names(layer), block_names(old_layer), strict=True):
            if old_name in state:
                old = state[old_name]
                grown[name] = old if itself else copy(name, old)
    return grown
