"""Tokens per second, model FLOPs utilisation and peak memory."""

import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from tokengrow.metrics import throughput
from tokengrow.metrics.throughput import Throughput, peak_flops, peak_memory

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@dataclass
class FakeFabric:
    """Substitute for Fabric with the attributes that Throughput reads."""

    world_size: int
    device: torch.device = CPU


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clock that advances by two seconds with every reading."""
    ticks = count(step=2)
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))


def measure(fabric: Any) -> dict[str, float]:
    """Return the metrics of 400 tokens in two seconds."""
    meter = Throughput(fabric, "bf16-mixed", flops_per_token=10**9)
    meter.add(300)
    meter.add(100)
    return meter.read()


def test_interval_starts_at_the_last_reading_or_reset() -> None:
    meter = Throughput(FakeFabric(1), "32-true", flops_per_token=1)
    meter.add(100)
    assert meter.read()["tokens_per_second"] == 50
    meter.add(20)
    meter.reset()  # drops the tokens of the interval too
    meter.add(8)
    assert meter.read()["tokens_per_second"] == 4


def test_several_devices_add_the_throughput_per_device() -> None:
    assert "tokens_per_second_per_device" not in measure(FakeFabric(1))
    metrics = measure(FakeFabric(4))
    assert (metrics["tokens_per_second"], metrics["tokens_per_second_per_device"]) == (200, 50)


def test_mfu_is_model_flops_over_the_peak_of_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "peak_flops", lambda device, precision: 1e12)
    # 200 tokens per second, 1 GFLOP each, on four devices of 1 TFLOP/s.
    assert measure(FakeFabric(4))["mfu"] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA RTX A1000 Laptop GPU", None),  # contains "A100"
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),  # a seventh of a GPU
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peak_flops_depends_on_the_name_of_the_gpu(
    monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(CUDA, "bf16-mixed") == peak


def test_float32_has_its_own_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(CUDA, "32-true") == 67e12


def test_cpu_has_no_mfu() -> None:
    assert "mfu" not in measure(FakeFabric(1))


STATUS = Path("/proc/self/status")


@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux's /proc/self/status")
def test_peak_memory_of_a_cpu_is_that_of_the_process() -> None:
    (line,) = (row for row in STATUS.read_text().splitlines() if row.startswith("VmHWM"))
    expected = int(line.split()[1]) * 1024
    memory = peak_memory(CPU)
    # The process may allocate between the two readings, and ru_maxrss includes the process that
    # started this one.
    assert memory is not None
    assert 0.95 * expected < memory < 20 * expected
