"""A ladder on two GPUs, through NCCL."""

import csv
import subprocess
from pathlib import Path

import pytest
import torch
from ranks import TORCHRUN

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


def losses(store: TokenStore, out: Path, devices: int, *changes: str) -> list[float]:
    """Of each update of the ladder, as the command logs them."""
    done = subprocess.run(
        [
            *(*TORCHRUN, f"--nproc-per-node={devices}", "-m", "tokengrow", "train", *RUN),
            *(f"store={store.folder}", f"out={out}", *changes),
        ],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with (out / "logs" / "version_0" / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]


@pytest.fixture(scope="module")
def alone(store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses on one GPU, in float32 by plain formulas."""
    out = tmp_path_factory.mktemp("alone") / "run"
    exact = ("fabric.precision=32", "kernel=reference", "compile=false")
    return losses(store, out, 1, "fabric=single", *exact)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_in_float32_the_losses_are_those_of_one_gpu(
    store: TokenStore, tmp_path: Path, alone: list[float], strategy: str
) -> None:
    exact = ("fabric.precision=32", "kernel=reference", "compile=false")
    found = losses(store, tmp_path / "run", 2, f"fabric={strategy}", *exact)
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "changes",
    [
        ("fabric=ddp",),
        ("fabric=ddp", "fabric.zero1=true", "fabric.activation_checkpointing=selective"),
        ("fabric=fsdp2",),
        ("fabric=fsdp2", "fabric.activation_checkpointing=block"),
        ("fabric=fsdp2", "fabric.precision=bf16-true"),
    ],
    ids="+".join,
)
def test_as_one_trains_compiled_in_bfloat16_the_losses_are_near(
    store: TokenStore, tmp_path: Path, alone: list[float], changes: tuple[str, ...]
) -> None:
    found = losses(store, tmp_path / "run", 2, *changes)
    torch.testing.assert_close(found, alone, rtol=2e-2, atol=0)
