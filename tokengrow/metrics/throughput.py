"""Throughput of training, model FLOPs utilisation and peak memory."""

import sys
import time

import torch
from lightning.fabric import Fabric

GIGABYTE = 1e9

PEAK_FLOPS = {
    "A100": (312e12, 19.5e12),
    "H100 NVL": (835e12, 60e12),
    "H100 PCIe": (756e12, 51e12),
    "H100": (989e12, 67e12),
    "H200 NVL": (835e12, 60e12),
    "H200": (989e12, 67e12),
    "GH200": (989e12, 67e12),
    "B200": (2250e12, 75e12),
    "L40S": (362e12, 91.6e12),
}
"""Words in the name of a GPU to its peak FLOP/s by the data sheet: (dense bfloat16 on tensor cores,
float32 without them). Lightning's own table does not match the name of an H200, and has the figures
for sparse products of some GPUs."""


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the peak FLOP/s of a device; None for an unknown GPU and for a CPU.

    The peak of a CPU depends on its threads and clock, and a measurement would differ between
    sessions.

    Args:
        device: device of the run.
        precision: 32-true, bf16-mixed or bf16-true.
    """
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    matches = [name for name in PEAK_FLOPS if set(name.split()) <= set(words)]
    if not matches or "MIG" in words:  # a slice of a GPU has the name of the GPU
        return None
    bfloat16, float32 = PEAK_FLOPS[max(matches, key=len)]
    return float32 if precision == "32-true" else bfloat16


def peak_memory(device: torch.device) -> float | None:
    """Return the peak memory so far, in bytes.

    Args:
        device: a GPU: memory that torch allocated on it; a CPU: memory of the process, None on
            Windows.
    """
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


class Throughput:
    """Throughput and utilisation of the devices since the last reading.

    Args:
        fabric: provides the device and the number of processes.
        precision: 32-true, bf16-mixed or bf16-true.
        flops_per_token: FLOPs of the model in training, forward and backward.
    """

    def __init__(self, fabric: Fabric, precision: str, flops_per_token: int) -> None:
        self._device, self._devices = fabric.device, fabric.world_size
        self._peak_flops = peak_flops(fabric.device, precision)
        self._flops_per_token = flops_per_token
        self.reset()

    def add(self, tokens: int) -> None:
        """Count tokens trained on."""
        self._tokens += tokens

    def reset(self) -> None:
        """Start a new interval, to exclude time that was not spent on training."""
        self._tokens, self._start = 0, time.perf_counter()

    def read(self) -> dict[str, float]:
        """Return the metrics of the interval by name, and start a new one.

        Returns:
            tokens_per_second: tokens per second of all devices.
            tokens_per_second_per_device: only with several devices.
            mfu: FLOP/s of the model over the peak of the devices; only if the peak is known.
            peak_memory_gb: peak memory of this process, gigabytes.
        """
        rate = self._tokens / max(time.perf_counter() - self._start, 1e-9)
        self.reset()
        metrics = {"tokens_per_second": rate}
        if self._devices > 1:
            metrics["tokens_per_second_per_device"] = rate / self._devices
        if self._peak_flops is not None:
            metrics["mfu"] = rate * self._flops_per_token / (self._peak_flops * self._devices)
        if (memory := peak_memory(self._device)) is not None:
            metrics["peak_memory_gb"] = memory / GIGABYTE
        return metrics
