"""Speed of a training step with AdamW, next to a Transformer and the device's peak."""

import gc
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tokengrow.bench.rows import Measurement
from tokengrow.bench.timing import (
    Timing,
    peak_memory,
    product_rate,
    relative_error,
    reset_peak_memory,
    time_steps,
)
from tokengrow.compat import unregister_module
from tokengrow.distributed.fabric import FabricConfig, build_fabric
from tokengrow.distributed.parallelize import compile_blocks
from tokengrow.errors import UserError
from tokengrow.model.architectures import build_model
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import LanguageModel
from tokengrow.model.transformer import TransformerConfig
from tokengrow.optim.config import OptimConfig
from tokengrow.training.module import TokenFormerModule

REPEATS, STEPS = 5, 4
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 2e-2, 0.1
"""Largest difference of the first loss to that of the plain formula, in nats, and relative error of
its gradient with respect to the first feed-forward values; bfloat16 rounds."""

PEERS: dict[str, tuple[str | None, bool]] = {
    "formula": ("reference", False),
    "formula-compiled": ("reference", True),
    "tokengrow-eager": ("auto", False),
    "tokengrow": ("auto", True),
    "transformer-compiled": (None, True),
}
"""Name to (kernel, or None for a Transformer of the same layers, width and heads; whether its
blocks are compiled)."""


def measure(
    cases: list[tuple[str, ModelConfig, int]], fabric: FabricConfig, peers: list[str]
) -> Iterator[Measurement]:
    """Measure every peer on every model.

    Args:
        cases: name, model and sequences in a step.
        fabric: device and precision.
        peers: some of `PEERS`.

    Raises:
        UserError: a peer whose first loss is another one; no time of it is given.
    """
    device = build_fabric(fabric.single_device()).device
    rate = product_rate(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    for name, config, batch in cases:
        reference = _reference(config, batch, fabric)
        for peer in peers:
            try:
                found = _train(config, batch, fabric, peer)
            except torch.OutOfMemoryError:
                found = Trained(Timing.none(), math.nan, 0.0, None)
            error = 0.0
            if PEERS[peer][0] is not None and found.first is not None:
                error = found.first.error(reference, f"{name}, {peer}")
            yield Measurement.on(
                device,
                found.timing,
                suite="step",
                case=f"{name}, {batch} x {config.context_length} tokens",
                peer=peer,
                dtype=fabric.chosen_precision,
                against_limit=round(found.flops / found.timing.median * 1e3 / rate, 3),
                peak_gb=round(found.peak_gb, 2),
                error=float(f"{error:.1e}"),
            )


@dataclass(frozen=True)
class First:
    """Results of a first step."""

    loss: float
    """Nats per token."""
    gradient: torch.Tensor
    """Gradient of the values of the first feed-forward layer [N, D], on the CPU."""

    @classmethod
    def of(cls, loss: float, model: nn.Module) -> "First":
        """Read the results of a model after its backward pass."""
        grad = model.get_parameter("blocks.0.ffn.value_param_tokens").grad
        assert grad is not None
        return cls(loss, grad.float().cpu())

    def error(self, reference: "First", where: str) -> float:
        """Relative error of the gradient.

        Raises:
            UserError: loss or gradient are off.
        """
        off = relative_error(self.gradient, reference.gradient)
        if not (abs(self.loss - reference.loss) <= LOSS_TOLERANCE and off <= GRADIENT_TOLERANCE):
            raise UserError(
                f"{where}: its first loss is {self.loss:.4f}, that of the plain formula "
                f"{reference.loss:.4f}, its gradient off by {off:.1e}: no time is given for it"
            )
        return off


@dataclass(frozen=True)
class Trained:
    """A model after some steps."""

    timing: Timing
    """Times of a step."""
    flops: float
    """FLOPs of a step."""
    peak_gb: float
    """Peak memory, GB."""
    first: First | None
    """Results of the first step; None: a Transformer, or out of memory."""


def _reference(config: ModelConfig, batch: int, settings: FabricConfig) -> First:
    """Compute the first step with the reference kernel, sequence by sequence."""
    fabric = build_fabric(settings.single_device())
    model, module, ids = _set_up(config, batch, fabric, "reference", compiles=False)
    total = 0.0
    for sequence in ids.split(1):
        with fabric.autocast():
            loss = module.training_step(sequence, 0) / batch
        fabric.backward(loss)
        total += loss.item()
    first = First.of(total, model)
    unregister_module(fabric, module)
    return first


def _set_up(
    config: ModelConfig, batch: int, fabric: Any, kernel: str | None, compiles: bool
) -> tuple[LanguageModel, Any, torch.Tensor]:
    """Return the model, its module in Fabric's wrapper, and random token ids [B, T + 1]."""
    gc.collect()  # Fabric's wrappers of the previous peer form cycles
    reset_peak_memory(fabric.device)
    torch.manual_seed(0)
    with fabric.init_module():
        model = build_model(config if kernel else TransformerConfig.matching(config))
    model.set_kernel(kernel or "auto")
    if compiles:
        compile_blocks(model.blocks)
    untrained: Any = TokenFormerModule(model, OptimConfig(), updates=1000)
    shape = batch, config.context_length + 1
    ids = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    return model, fabric.setup_module(untrained), ids.to(fabric.device)


def _train(config: ModelConfig, batch: int, settings: FabricConfig, peer: str) -> Trained:
    """Train steps on one batch of random tokens."""
    fabric = build_fabric(settings.single_device())
    kernel, compiles = PEERS[peer]
    model, module, ids = _set_up(config, batch, fabric, kernel, compiles)
    optimizer: Any = fabric.setup_optimizers(module.configure_optimizers()["optimizer"])

    def learn() -> torch.Tensor:
        with fabric.autocast():
            loss: torch.Tensor = module.training_step(ids, 0)
        fabric.backward(loss)
        return loss

    def step() -> None:
        learn()
        norm = OptimConfig().grad_clip
        fabric.clip_gradients(module, optimizer, max_norm=norm, error_if_nonfinite=False)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    loss = learn().item()
    first = First.of(loss, model) if kernel else None
    optimizer.zero_grad(set_to_none=True)
    timing = time_steps(step, fabric.device, REPEATS, STEPS)
    unregister_module(fabric, module)
    flops = model.config.flops_per_token()
    peak = peak_memory(fabric.device)
    return Trained(timing, flops * batch * config.context_length, peak, first)
