"""Detection of the launcher of this process: `torchrun`, `fabric run`, Slurm's `srun`, or none.

It reads only the environment and does not import torch, so that short commands stay fast.
"""

import os
from dataclasses import dataclass

from tokengrow.errors import UserError

CLUSTER_GUIDE = "docs/running-on-a-cluster.md"
"""Page that error messages refer to."""

INTERACTIVE_JOB_NAMES = ("bash", "interactive")
"""Names of interactive Slurm jobs, in which srun started a shell and not this process."""


@dataclass(frozen=True)
class Launch:
    """Processes that a launcher has started."""

    launcher: str
    """Command of the launcher: torchrun or srun."""
    devices: int
    """Processes per node, one for each device."""
    num_nodes: int
    """Number of nodes."""


def detect_launch() -> Launch | None:
    """Return the launch that this process belongs to; None without a launcher.

    Raises:
        UserError: the nodes have different numbers of processes.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher, world_size = "torchrun", int(os.environ["WORLD_SIZE"])
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        num_nodes = world_size // devices
    elif _is_srun_task():
        launcher, world_size = "srun", int(os.environ["SLURM_NTASKS"])
        num_nodes = int(os.environ["SLURM_NNODES"])
        devices = world_size // num_nodes
    else:
        return None
    if devices * num_nodes != world_size:
        raise UserError(
            f"Every node must have the same number of processes, got {world_size} processes on "
            f"{num_nodes} nodes. Start as many on each node ({CLUSTER_GUIDE})."
        )
    return Launch(launcher, devices, num_nodes)


def rank_from_env() -> int:
    """Return the rank of this process from its environment; 0 without a launcher."""
    for name in ("RANK", "SLURM_PROCID" if _is_srun_task() else "LOCAL_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def fabric_run_options() -> dict[str, str]:
    """Return the options of `fabric run` as values of `FabricConfig`; empty without it.

    `fabric run` passes its options in the environment, where they would override the arguments of
    `Fabric`. This function removes them from there.
    """
    if os.environ.pop("LT_CLI_USED", None) != "1":
        return {}
    options = {
        key: value
        for key in ("accelerator", "strategy", "devices", "num_nodes", "precision")
        if (value := os.environ.pop(f"LT_{key.upper()}", None)) is not None
    }
    # `fabric run` starts the processes with torchrun, so `detect_launch` returns their number.
    options.pop("devices"), options.pop("num_nodes")
    if options.get("accelerator") == "gpu":
        options["accelerator"] = "cuda"
    return options


def _is_srun_task() -> bool:
    # A batch script has SLURM_NTASKS too, but only a task of srun has a step.
    if "SLURM_STEP_ID" not in os.environ:
        return False
    return os.environ.get("SLURM_JOB_NAME") not in INTERACTIVE_JOB_NAMES
