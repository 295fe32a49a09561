"""How fast a stage's model trains here: a few steps on random tokens, timed.

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

from tokengrow.distributed.fabric import build_fabric, device_name, unregister_module
from tokengrow.distributed.parallelize import compile_blocks
from tokengrow.model.architectures import build_model
from tokengrow.model.config import LanguageModelConfig
from tokengrow.training.config import StageConfig, TrainConfig
from tokengrow.training.device_memory import explain_out_of_memory
from tokengrow.training.module import TokenFormerModule

WARM_UP, TIMED = 1, 3
"""Steps: the first allocates and chooses its kernels, and does not count."""


@dataclass(frozen=True)
class Speed:
    """What was measured."""

    device: str
    """On which device."""
    flops_per_second: dict[str, float]
    """Stage name to FLOP/s of its training."""


def measure_throughput(run: TrainConfig, console: Console) -> Speed:
    """Trains each stage's model for a few steps, as the run would on this machine.

    Args:
        run: its stages, batch sizes and fabric.
        console: where the status is shown.

    Raises:
        UserError: a model or micro-batch that does not fit into memory.
    """
    run.check_kernel()
    fabric = build_fabric(run.fabric.single_device())
    device = device_name(fabric.device)
    found: dict[LanguageModelConfig, float] = {}  # stages of one size are equally fast
    for stage in run.stages:
        if stage.model in found:
            continue
        with console.status(f"measuring stage {stage.name} on {device}"):
            with explain_out_of_memory(run, stage, device):
                found[stage.model] = _flops_per_second(run, stage, fabric)
            gc.collect()  # the wrappers refer to each other, and the next model needs the room
    return Speed(device, {stage.name: found[stage.model] for stage in run.stages})


def _flops_per_second(run: TrainConfig, stage: StageConfig, fabric: Fabric) -> float:
    """FLOP/s of an update: its micro-batches, and what AdamW does once after them."""
    with fabric.init_module():
        model = build_model(stage.model)
    model.set_kernel(run.kernel)
    if run.compiles:
        compile_blocks(model.blocks)
    module = fabric.setup_module(TokenFormerModule(model, stage.optim, stage.steps))
    optimizer: Any = fabric.setup_optimizers(module.configure_optimizers()["optimizer"])
    shape = run.micro_batch_size, stage.model.context_length + 1
    batch = torch.randint(stage.model.vocab_size, shape, device=fabric.device)  # [B, T + 1]
    parts = run.batch_size // run.micro_batch_size

    def learn() -> None:
        with fabric.autocast():
            loss = module.training_step(batch, 0) / parts
        fabric.backward(loss)

    def update() -> None:
        fabric.clip_gradients(
            module, optimizer, max_norm=stage.optim.grad_clip, error_if_nonfinite=False
        )
        optimizer.step()
        # Between the micro-batches of an update the gradients of those before are held.
        optimizer.zero_grad(set_to_none=parts == 1)

    times = [(_seconds(fabric, learn), _seconds(fabric, update)) for _ in range(WARM_UP + TIMED)]
    learning, updating = (median(column) for column in zip(*times[WARM_UP:], strict=True))
    unregister_module(fabric, module)
    tokens = run.batch_size * stage.model.context_length
    return tokens * stage.model.flops_per_token() / (parts * learning + updating)


def _seconds(fabric: Fabric, work: Callable[[], None]) -> float:
    """Seconds that work takes on the device, not only to be queued there."""
    started = time.perf_counter()
    work()
    if fabric.device.type == "cuda":
        torch.cuda.synchronize(fabric.device)
    return time.perf_counter() - started
