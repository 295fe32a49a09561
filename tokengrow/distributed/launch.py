"""What started this process: nobody, `torchrun` (or `fabric run`), or Slurm's `srun`.

Found out from the environment alone, without torch, for whoever is to be quick.
"""

import os
from dataclasses import dataclass
from typing import Any

from tokengrow.errors import UserError

GUIDE = "docs/running-on-a-cluster.md"
INTERACTIVE = ("bash", "interactive")
"""Names of Slurm jobs in which a person types, and starts processes by other means."""


@dataclass(frozen=True)
class Launch:
    """The processes of a job that a launcher has started."""

    by: str
    """The launcher, as one types it."""
    devices: int
    """Processes on each node, one for each device."""
    num_nodes: int
    """Nodes."""


def find_launch() -> Launch | None:
    """The launcher that started this process; None: it was started by itself.

    Raises:
        UserError: as many processes on some nodes as not on others.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
        return Launch("torchrun", *_even(world, local, world // local))
    if _started_by_srun():
        world, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_NNODES"])
        return Launch("srun", *_even(world, world // nodes, nodes))
    return None


def process_rank() -> int:
    """Number of this process in its job, as far as its environment says; 0 where it is alone."""
    for name in ("RANK", "SLURM_PROCID" if _started_by_srun() else "LOCAL_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def fabric_run_options() -> dict[str, Any]:
    """What `fabric run` was given, as values of `FabricConfig`; empty without it.

    It hands its options on in the environment, where Fabric would take them in place of ours: they
    are taken out of it.
    """
    if os.environ.pop("LT_CLI_USED", None) != "1":
        return {}
    given = {
        key: value
        for key in ("accelerator", "strategy", "devices", "num_nodes", "precision")
        if (value := os.environ.pop(f"LT_{key.upper()}", None)) is not None
    }
    # It has started as many processes as these say, which are found as torchrun's are.
    given.pop("devices"), given.pop("num_nodes")
    if given.get("accelerator") == "gpu":
        given["accelerator"] = "cuda"
    return given


def _started_by_srun() -> bool:
    # A batch script has SLURM_NTASKS too, but only what srun starts is in a step.
    return "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in INTERACTIVE


def _even(world: int, devices: int, nodes: int) -> tuple[int, int]:
    if devices * nodes != world:
        raise UserError(
            f"{world} processes on {nodes} nodes are not as many on each: start as many on each "
            f"node ({GUIDE})"
        )
    return devices, nodes
