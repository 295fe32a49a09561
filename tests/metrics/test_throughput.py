"""Tokens per second, the share of a device's peak, and memory."""

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
class Processes:
    """What of a Fabric is asked for."""

    world_size: int
    device: torch.device = CPU


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is two seconds after the one before."""
    ticks = count(step=2)
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))


def measured(fabric: Any) -> dict[str, float]:
    speed = Throughput(fabric, "bf16-mixed", flops_per_token=10**9)
    speed.add(300)
    speed.add(100)
    return speed.read()


def test_tokens_count_over_the_time_since_the_last_reading() -> None:
    speed = Throughput(Processes(1), "32-true", flops_per_token=1)
    speed.add(100)
    assert speed.read()["tokens_per_second"] == 50
    speed.add(20)
    speed.restart()  # what was counted before something else is left out
    speed.add(8)
    assert speed.read()["tokens_per_second"] == 4


def test_several_devices_have_the_speed_of_one_as_well() -> None:
    assert "tokens_per_second_per_device" not in measured(Processes(1))
    found = measured(Processes(4))
    assert (found["tokens_per_second"], found["tokens_per_second_per_device"]) == (200, 50)


def test_the_share_of_peak_is_model_flops_over_that_of_all_devices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(throughput, "peak_flops", lambda device, precision: 1e12)
    # 200 tokens a second, a GFLOP each, on four devices of a TFLOP/s.
    assert measured(Processes(4))["mfu"] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("name", "narrow"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA RTX A1000 Laptop GPU", None),  # holds A100
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),  # a seventh of one
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_a_gpu_is_known_by_its_name(
    monkeypatch: pytest.MonkeyPatch, name: str, narrow: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(CUDA, "bf16-mixed") == narrow


def test_float32_has_a_peak_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(CUDA, "32-true") == 67e12


def test_on_a_cpu_no_share_of_peak_is_claimed() -> None:
    assert "mfu" not in measured(Processes(1))


STATUS = Path("/proc/self/status")


@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux's account of a process")
def test_memory_on_a_cpu_is_what_the_process_had_at_most() -> None:
    (line,) = (row for row in STATUS.read_text().splitlines() if row.startswith("VmHWM"))
    at_most = int(line.split()[1]) * 1024
    memory = peak_memory(CPU)
    # A little may come between the two, and it counts what started this process.
    assert memory is not None
    assert 0.95 * at_most < memory < 20 * at_most
