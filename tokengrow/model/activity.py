"""What each parameter token of a model does on a text.

A Pattention layer's output is `out = Σ_n f_n v_n`, f_n being the weight of parameter token n after
the activation and v_n its value. Taking token n away, the other weights held, moves the output at a
position by f_n v_n, whose squared length is `f_n² ‖v_n‖²`; its mean over the positions of a text is
the token's *contribution*. A token whose key is zero scores 0: with a GELU it contributes nothing.

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
"""A Pattention layer: number of its block, and role."""


@dataclass
class Activity:
    """What the parameter tokens of one layer did on a text: means over its positions."""

    contribution: Tensor
    """[N] float64: squared length of what each token added to the output."""
    share: Tensor
    """[N] float64: share of each token in the sum that the activation divides by."""
    square: Tensor
    """[N] float64: square of each token's score."""

    def mean_over(self, positions: int) -> "Activity":
        """Sums over so many positions, on any device, to means on the CPU."""
        sums = self.contribution, self.share, self.square
        return Activity(*(each.div_(positions).cpu() for each in sums))


@torch.inference_mode()
def measure_activity(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    ids: Tensor,
    device: torch.device | str = "cpu",
    watch: Callable[[Iterable[int]], Iterable[int]] = lambda blocks: blocks,
) -> dict[Layer, Activity]:
    """What every parameter token of a model does, computed in float32.

    One block is in memory at a time, whatever the model's size, and takes one sequence after the
    other: every layer's scores [T, N] are summed where they arise.

    Args:
        config: of the model.
        weights: its state dict on the CPU, in any precision; each tensor is looked at once.
        ids: [B, T] int64 token ids.
        device: that computes.
        watch: shows progress over the numbers of the blocks.
    """
    device = torch.device(device)
    x = weights["embedding.weight"][ids].to(device, torch.float32)  # [B, T, D]
    table = rotary_table(0, ids.shape[1], config.rotary_channels, config.rotary_base, device)
    # Before the first block: small tensors made between large ones would keep the memory that those
    # have left from being given back.
    activity = {
        (number, role): Activity(*torch.zeros(3, n, dtype=torch.float64, device=device))
        for number in range(config.layers)
        for role, n in config.tokens.items()
    }
    for number in watch(range(config.layers)):
        block = _block(config, weights, number, device)
        for role, layer in pattention_layers(block):
            layer.register_forward_hook(partial(_add, activity[number, role]))
        with fastest_attention():
            for sequence in x.split(1):
                sequence.copy_(block(sequence, table))
    return {layer: each.mean_over(ids.numel()) for layer, each in activity.items()}


def _block(
    config: ModelConfig, weights: Mapping[str, Tensor], number: int, device: torch.device
) -> nn.Module:
    """One block of the model there, in float32."""
    with torch.device("meta"):
        block = PattentionBlock(config, number)
    state = {
        name: weights[f"blocks.{number}.{name}"].to(device, torch.float32)
        for name in block.state_dict()
    }
    block.load_state_dict(state, assign=True)
    return block


def _add(activity: Activity, layer: nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
    """Forward hook: adds what the layer's tokens did at every position of its input [.., D]."""
    assert isinstance(layer, Pattention)
    scores, weights, shares = layer.scores_weights_and_shares(inputs[0].flatten(0, -2))  # [B T, N]
    lengths = layer.value_param_tokens.double().square().sum(1)  # [N]
    activity.contribution += weights.square().sum(0, dtype=torch.float64) * lengths
    activity.share += shares.sum(0, dtype=torch.float64)
    activity.square += scores.square().sum(0, dtype=torch.float64)
