"""Measured throughput of training steps, on tiny models."""

import gc
import io
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.status import Status

from tokengrow.distributed.fabric import FabricConfig
from tokengrow.errors import UserError
from tokengrow.model.tokenformer import TokenFormer
from tokengrow.planning.profiling import measure_throughput
from tokengrow.training.config import TrainConfig

Runs = Callable[..., TrainConfig]


def quiet() -> Console:
    """Return a console without output."""
    return Console(quiet=True)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_every_stage_has_a_throughput(tiny_run: Runs, tmp_path: Path, precision: str) -> None:
    fabric = FabricConfig(accelerator="cpu", precision=precision)
    throughput = measure_throughput(tiny_run(tmp_path, fabric=fabric), quiet())
    assert list(throughput.flops_per_second) == ["n8", "n12", "n16"]
    assert throughput.device.startswith("CPU (")


def test_update_has_its_micro_batches_and_one_adamw_step(
    tiny_run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))  # 1 s per call
    run = tiny_run(tmp_path, rungs=(8,), batch_size=64, micro_batch_size=16)
    (found,) = measure_throughput(run, quiet()).flops_per_second.values()
    # 64 sequences of 32 tokens: four micro-batches of 1 s each, and 1 s of AdamW.
    assert found == 64 * 32 * run.stages[0].model.flops_per_token() / (4 + 1)


def shown(run: TrainConfig) -> str:
    """Return the status that a measurement shows on a terminal."""
    terminal = Console(file=io.StringIO(), force_terminal=True, record=True, width=80)
    measure_throughput(run, terminal)
    return terminal.export_text()


def test_status_names_the_stage_and_the_device(tiny_run: Runs, tmp_path: Path) -> None:
    assert "measuring stage n8 on CPU (" in shown(tiny_run(tmp_path, rungs=(8,)))


def test_stages_of_one_size_are_measured_once(tiny_run: Runs, tmp_path: Path) -> None:
    run = tiny_run(tmp_path, rungs=(8,))
    (stage,) = run.stages
    twice = replace(run, stages=(stage, replace(stage, name="again")))
    assert set(measure_throughput(twice, quiet()).flops_per_second) == {"n8", "again"}
    said = shown(twice)
    assert "stage n8" in said and "stage again" not in said


def test_model_is_freed_before_the_next_is_measured(tiny_run: Runs, tmp_path: Path) -> None:
    alive: list[int] = []

    class Watching(Console):
        def status(self, *arguments: Any, **options: Any) -> Status:
            alive.append(sum(type(found) is TokenFormer for found in gc.get_objects()))
            return super().status(*arguments, **options)

    measure_throughput(tiny_run(tmp_path, rungs=(8, 12, 16)), Watching(quiet=True))
    assert alive == [alive[0]] * 3


def test_model_too_large_for_memory_is_reported(tiny_run: Runs, tmp_path: Path) -> None:
    micro = 2**41  # 2.2 trillion sequences: 580 terabytes of ids
    run = tiny_run(tmp_path, rungs=(8,), batch_size=micro, micro_batch_size=micro)
    with pytest.raises(UserError, match=rf"^stage n8 does not fit .* micro_batch_size={micro}\."):
        measure_throughput(run, quiet())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_is_named_and_its_memory_is_limited(tiny_run: Runs, tmp_path: Path) -> None:
    run = tiny_run(tmp_path, rungs=(8,), fabric=FabricConfig(accelerator="cuda"))
    assert measure_throughput(run, quiet()).device == torch.cuda.get_device_name()
    micro = 2**41
    with pytest.raises(UserError, match=f"micro_batch_size={micro}"):
        measure_throughput(replace(run, batch_size=micro, micro_batch_size=micro), quiet())
