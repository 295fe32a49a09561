"""How fast training is, how much of the device it uses, and the memory that it has taken."""

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
"""Words in a GPU's name to the FLOP/s of its data sheet: in bfloat16 on tensor cores, dense, and in
float32 without them. Lightning's table is not taken: it does not know the name that an H200 gives,
and has the figures of sparse products for some."""


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s that a device can do at most; None where its data sheet is not known.

    A CPU has none: what it can do depends on its threads and its clock, and a measured figure
    would be another one in each session.

    Args:
        device: that trains.
        precision: 32-true, bf16-mixed or bf16-true.
    """
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    known = [name for name in PEAK_FLOPS if set(name.split()) <= set(words)]
    if not known or "MIG" in words:  # a slice of a GPU bears its name
        return None
    narrow, single = PEAK_FLOPS[max(known, key=len)]
    return single if precision == "32-true" else narrow


def peak_memory(device: torch.device) -> float | None:
    """Bytes allocated at most so far: on a GPU, or by the process in all; None on Windows."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


class Throughput:
    """Tokens per second since it was last asked, and the share of the devices' peak."""

    def __init__(self, fabric: Fabric, precision: str, flops_per_token: int) -> None:
        """Args:
        fabric: its device and number of processes.
        precision: 32-true, bf16-mixed or bf16-true.
        flops_per_token: of the model in training, forward and backward.
        """
        self._device, self._devices = fabric.device, fabric.world_size
        self._peak = peak_flops(fabric.device, precision)
        self._flops_per_token = flops_per_token
        self.restart()

    def add(self, tokens: int) -> None:
        """Counts tokens trained on."""
        self._tokens += tokens

    def restart(self) -> None:
        """Leaves out what was spent on something other than training."""
        self._tokens, self._since = 0, time.perf_counter()

    def read(self) -> dict[str, float]:
        """Metrics by name; starts a new interval.

        tokens_per_second, of all devices; with more than one, tokens_per_second_per_device; mfu,
        the model's FLOP/s over the peak of the devices, where that is known; peak_memory_gb, of
        this process.
        """
        rate = self._tokens / max(time.perf_counter() - self._since, 1e-9)
        self.restart()
        found = {"tokens_per_second": rate}
        if self._devices > 1:
            found["tokens_per_second_per_device"] = rate / self._devices
        if self._peak is not None:
            found["mfu"] = rate * self._flops_per_token / (self._peak * self._devices)
        if (memory := peak_memory(self._device)) is not None:
            found["peak_memory_gb"] = memory / GIGABYTE
        return found
