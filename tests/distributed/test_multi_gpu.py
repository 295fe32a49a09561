"""A ladder on two GPUs, through NCCL."""

import csv
import subprocess
from pathlib import Path

import pytest
import torch
from launchers import TORCHRUN

from tokengrow.data.store import TokenStore

pytestmark = [
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

RUN = (
    "recipes=quickstart",
    "model.vocab_size=512",
    "model.context_length=128",
    "max_steps_per_stage=12",
    "validation_every=100",
    "validation_sequences=16",
    "micro_batch_size=4",
    "log_every=1",
)

FLOAT32 = ("fabric.precision=32", "kernel=reference", "compile=false")
"""Overrides for float32 with the reference formulas."""


def train(store: TokenStore, out: Path, devices: int, *overrides: str) -> list[float]:
    """Train the ladder with torchrun, and return the logged loss of each update."""
    done = subprocess.run(
        [
            *(*TORCHRUN, f"--nproc-per-node={devices}", "-m", "tokengrow", "train", *RUN),
            *(f"store={store.folder}", f"out={out}", *overrides),
        ],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with (out / "logs" / "version_0" / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]


@pytest.fixture(scope="module")
def single_gpu_losses(store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses on one GPU in float32."""
    out = tmp_path_factory.mktemp("single") / "run"
    return train(store, out, 1, "fabric=single", *FLOAT32)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_float32_losses_equal_those_of_one_gpu(
    store: TokenStore, tmp_path: Path, single_gpu_losses: list[float], strategy: str
) -> None:
    losses = train(store, tmp_path / "run", 2, f"fabric={strategy}", *FLOAT32)
    torch.testing.assert_close(losses, single_gpu_losses, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "overrides",
    [
        ("fabric=ddp",),
        ("fabric=ddp", "fabric.zero1=true", "fabric.activation_checkpointing=selective"),
        ("fabric=fsdp2",),
        ("fabric=fsdp2", "fabric.activation_checkpointing=block"),
        ("fabric=fsdp2", "fabric.precision=bf16-true"),
    ],
    ids="+".join,
)
def test_compiled_bfloat16_losses_are_close_to_float32(
    store: TokenStore, tmp_path: Path, single_gpu_losses: list[float], overrides: tuple[str, ...]
) -> None:
    losses = train(store, tmp_path / "run", 2, *overrides)
    torch.testing.assert_close(losses, single_gpu_losses, rtol=2e-2, atol=0)
