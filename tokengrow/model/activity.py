"""Contribution of each parameter token of a model on a text.

The output of a Pattention layer is `out = Σ_n f_n v_n`, where f_n is the weight of parameter token
n after the activation, and v_n its value. Removing token n, with all other weights fixed, changes
the output at a position by f_n v_n, whose squared length is `f_n² ‖v_n‖²`. The mean of this over
the positions of a text is the *contribution* of the token. A token whose key is zero has score 0,
so with a GELU it contributes nothing.

Shapes: `B` batch, `T` sequence, `N` parameter tokens, `D` width.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tokengrow.model.config import ModelConfig
from tokengrow.model.pattention import Pattention
from tokengrow.model.rotary import rotary_table
from tokengrow.model.tokenformer import PattentionBlock, fastest_attention, pattention_layers

Layer = tuple[int, str]
"""Pattention layer: index of its block, and role."""


@dataclass
class Activity:
    """Activity of the parameter tokens of one layer: means over the positions of a text."""

    contribution: Tensor
    """[N] float64: squared length of the term that each token adds to the output."""
    share: Tensor
    """[N] float64: share of each token in the sum that the activation divides by."""
    square: Tensor
    """[N] float64: square of the score of each token."""

    def mean_over(self, positions: int) -> "Activity":
        """Return the means on the CPU, where `self` has the sums over the positions."""
        sums = self.contribution, self.share, self.square
        return Activity(*(total.div_(positions).cpu() for total in sums))


@torch.inference_mode()
def measure_activity(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    ids: Tensor,
    device: torch.device | str = "cpu",
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda blocks: blocks,
) -> dict[Layer, Activity]:
    """Measure the activity of every parameter token of a model, in float32.

    Only one block is in memory at a time, for every model size. It processes one sequence at a
    time, and the scores [T, N] of each layer are summed immediately.

    Args:
        config: config of the model.
        weights: its state dict on the CPU, in any dtype; each tensor is read once.
        ids: [B, T] int64 token ids.
        device: device that computes.
        progress: wrapper of the iteration over block indices, which displays progress.
    """
    device = torch.device(device)
    x = weights["embedding.weight"][ids].to(device, torch.float32)  # [B, T, D]
    table = rotary_table(0, ids.shape[1], config.rotary_channels, config.rotary_base, device)
    # Allocated before the first block, because small tensors between large ones would prevent the
    # memory of the large ones from being released.
    activity = {
        (index, role): Activity(*torch.zeros(3, n, dtype=torch.float64, device=device))
        for index in range(config.layers)
        for role, n in config.tokens.items()
    }
    for index in progress(range(config.layers)):
        block = _load_block(config, weights, index, device)
        for role, layer in pattention_layers(block):
            layer.register_forward_hook(partial(_add_activity, activity[index, role]))
        with fastest_attention():
            for sequence in torch.split(x, 1):
                sequence.copy_(block(sequence, table))
    return {layer: sums.mean_over(ids.numel()) for layer, sums in activity.items()}


def _load_block(
    config: ModelConfig, weights: Mapping[str, Tensor], index: int, device: torch.device
) -> nn.Module:
    """Return one block of the model on a device, in float32."""
    with torch.device("meta"):
        block = PattentionBlock(config, index)
    state = {
        name: weights[f"blocks.{index}.{name}"].to(device, torch.float32)
        for name in block.state_dict()
    }
    block.load_state_dict(state, assign=True)
    return block


def _add_activity(activity: Activity, layer: nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
    """Add the activity of a layer at every position of its input [.., D], as a forward hook."""
    assert isinstance(layer, Pattention)
    scores, weights, shares = layer.scores_weights_and_shares(inputs[0].flatten(0, -2))  # [B T, N]
    lengths = layer.value_param_tokens.double().square().sum(1)  # [N]
    activity.contribution += weights.square().sum(0, dtype=torch.float64) * lengths
    activity.share += shares.sum(0, dtype=torch.float64)
    activity.square += scores.square().sum(0, dtype=torch.float64)
