"""A whole training step, AdamW included: share of the device's rate, beside a GPT."""

import gc
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tokengrow.bench.gpt import GPT
from tokengrow.bench.rows import Measurement
from tokengrow.bench.timing import Timing, peak_memory, product_rate, reset_peak_memory, time_steps
from tokengrow.distributed.fabric import FabricConfig, build_fabric, release
from tokengrow.distributed.parallelize import compile_blocks
from tokengrow.errors import UserError
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import TokenFormer
from tokengrow.training.module import TokenFormerModule
from tokengrow.training.optim import OptimConfig

REPEATS, STEPS = 5, 4
TOLERANCE = 2e-2
"""Largest difference of a first loss to that of the plain formula, in nats; bfloat16 rounds."""

PEERS: dict[str, tuple[str | None, bool]] = {
    "formula": ("naive", False),
    "formula, compiled": ("naive", True),
    "tokengrow": ("auto", False),
    "tokengrow, compiled": ("auto", True),
    "GPT, compiled": (None, True),
}
"""Name to (kernel, or None for the GPT; whether its blocks are compiled)."""


def measure(
    cases: list[tuple[str, ModelConfig, int]], fabric: FabricConfig, peers: list[str]
) -> Iterator[Measurement]:
    """Every peer on every model.

    Args:
        cases: name, model and sequences in a step.
        fabric: device and precision.
        peers: some of `PEERS`.

    Raises:
        UserError: a peer whose first loss is another one; no time of it is given.
    """
    device = build_fabric(fabric).device
    rate = product_rate(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    for name, config, batch in cases:
        reference: float | None = None
        for peer in peers:
            try:
                found = _train(config, batch, fabric, peer)
            except torch.OutOfMemoryError:
                found = Trained(Timing.none(), math.nan, 0.0, None)
            error = 0.0
            if PEERS[peer][0] is not None and found.loss is not None:
                reference = found.loss if reference is None else reference
                error = abs(found.loss - reference)
                if not error <= TOLERANCE:
                    raise UserError(
                        f"{name}, {peer}: its first loss is {found.loss:.4f}, that of the peers "
                        f"before {reference:.4f}: no time is given for it"
                    )
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
class Trained:
    """A model after some steps."""

    timing: Timing
    """Of a step."""
    flops: float
    """Of a step."""
    peak_gb: float
    """Of memory."""
    loss: float | None
    """Of the first step; None where memory was too small for one."""


def _train(config: ModelConfig, batch: int, settings: FabricConfig, peer: str) -> Trained:
    """Steps on one batch of random tokens."""
    fabric = build_fabric(settings)
    device = fabric.device
    gc.collect()  # Fabric's wrappers of the peer before refer to each other
    reset_peak_memory(device)
    torch.manual_seed(0)
    kernel, compiles = PEERS[peer]
    with fabric.init_module():
        model: nn.Module = TokenFormer(config) if kernel else GPT(config)
    if isinstance(model, TokenFormer) and kernel:
        model.set_kernel(kernel)
    if compiles:
        compile_blocks(model.blocks)  # type: ignore[arg-type]
    optim = OptimConfig()
    module: Any = fabric.setup_module(TokenFormerModule(model, optim, updates=1000))  # type: ignore[arg-type]
    optimizer: Any = fabric.setup_optimizers(module.configure_optimizers()["optimizer"])
    shape = batch, config.context_length + 1
    ids = torch.randint(config.vocab_size, shape, device=device)  # [B, T + 1]

    def step() -> torch.Tensor:
        with fabric.autocast():
            loss: torch.Tensor = module.training_step(ids, 0)
        fabric.backward(loss)
        fabric.clip_gradients(module, optimizer, max_norm=optim.grad_clip, error_if_nonfinite=False)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    first = step().item()
    timing = time_steps(step, device, REPEATS, STEPS)
    release(fabric, module)
    flops = (config if kernel else model).flops_per_token()  # type: ignore[operator]
    return Trained(timing, flops * batch * config.context_length, peak_memory(device), first)
