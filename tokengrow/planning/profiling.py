"""Measured training throughput of the stages of a run: a few timed steps on random tokens.

Shapes: `B` micro-batch, `T` sequence.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from lightning.fabric import Fabric
from rich.console import Console

from tokengrow.compat import unregister_module
from tokengrow.distributed.fabric import build_fabric, device_name
from tokengrow.distributed.parallelize import compile_blocks
from tokengrow.model.architectures import build_model
from tokengrow.model.config import LanguageModelConfig
from tokengrow.training.config import StageConfig, TrainConfig
from tokengrow.training.device_memory import explain_out_of_memory
from tokengrow.training.module import TokenFormerModule

WARMUP_STEPS, TIMED_STEPS = 1, 3
"""Numbers of steps; the warm-up allocates memory and selects kernels, and is not counted."""


@dataclass(frozen=True)
class MeasuredThroughput:
    """Training throughput of each stage on a device."""

    device: str
    """Name of the device."""
    flops_per_second: dict[str, float]
    """Stage name to training throughput, FLOP/s."""


def measure_throughput(run: TrainConfig, console: Console) -> MeasuredThroughput:
    """Train the model of each stage for a few steps on one device and measure the throughput.

    Args:
        run: run with its stages, batch sizes and fabric.
        console: console for the status line.

    Raises:
        UserError: a model and one micro-batch do not fit into memory.
    """
    run.check_kernel()
    fabric = build_fabric(run.fabric.single_device())
    device = device_name(fabric.device)
    measured: dict[LanguageModelConfig, float] = {}  # equal sizes have equal throughput
    for stage in run.stages:
        if stage.model in measured:
            continue
        with console.status(f"measuring stage {stage.name} on {device}"):
            with explain_out_of_memory(run, stage, device):
                measured[stage.model] = _flops_per_second(run, stage, fabric)
            gc.collect()  # free the cycles of wrappers before the next model is allocated
    return MeasuredThroughput(device, {stage.name: measured[stage.model] for stage in run.stages})


def _flops_per_second(run: TrainConfig, stage: StageConfig, fabric: Fabric) -> float:
    """Return the FLOP/s of an update: its micro-batches, and one step of AdamW."""
    with fabric.init_module():
        model = build_model(stage.model)
    model.set_kernel(run.kernel)
    if run.compiles:
        compile_blocks(model.blocks)
    module = fabric.setup_module(TokenFormerModule(model, stage.optim, stage.steps))
    optimizer: Any = fabric.setup_optimizers(module.configure_optimizers()["optimizer"])
    shape = run.micro_batch_size, stage.model.context_length + 1
    batch = torch.randint(stage.model.vocab_size, shape, device=fabric.device)  # [B, T + 1]
    micro_batches = run.batch_size // run.micro_batch_size

    def forward_backward() -> None:
        with fabric.autocast():
            loss = module.training_step(batch, 0) / micro_batches
        fabric.backward(loss)

    def update() -> None:
        fabric.clip_gradients(
            module, optimizer, max_norm=stage.optim.grad_clip, error_if_nonfinite=False
        )
        optimizer.step()
        # With several micro-batches, gradients exist during the forward pass.
        optimizer.zero_grad(set_to_none=micro_batches == 1)

    times = [
        (_seconds(fabric, forward_backward), _seconds(fabric, update))
        for _ in range(WARMUP_STEPS + TIMED_STEPS)
    ]
    micro_batch_seconds, update_seconds = (
        median(column) for column in zip(*times[WARMUP_STEPS:], strict=True)
    )
    unregister_module(fabric, module)
    flops = run.batch_size * stage.model.context_length * stage.model.flops_per_token()
    seconds: float = micro_batches * micro_batch_seconds + update_seconds
    return flops / seconds


def _seconds(fabric: Fabric, work: Callable[[], None]) -> float:
    """Return the time that `work` takes on the device, s, including queued kernels."""
    started = time.perf_counter()
    work()
    if fabric.device.type == "cuda":
        torch.cuda.synchronize(fabric.device)
    return time.perf_counter() - started
