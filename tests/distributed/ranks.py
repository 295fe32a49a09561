"""Several processes that train together, as launchers start them."""

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokengrow.data.store import TokenStore
from tokengrow.training.config import TrainConfig

WORKER = Path(__file__).parent / "worker.py"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
TOKENGROW = (sys.executable, "-m", "tokengrow")
LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK")

SLURM_JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "ladder",
    "SLURM_NODELIST": "127.0.0.1",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_NNODES": "1",
    "SLURM_NODEID": "0",
}
"""What srun tells two tasks on one node: as Slurm 22.05 does, no SLURM_NTASKS_PER_NODE."""


@dataclass(frozen=True)
class Ended:
    """What a command did."""

    status: int
    said: str
    """Its stdout and stderr, in the order in which they came."""


def environment(**more: str) -> dict[str, str]:
    """Of a process on the CPU that no launcher has started yet."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    return kept | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "COLUMNS": "200"} | more


def free_port() -> int:
    """A port at which nobody listens: tests may run beside each other."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def slurm_job() -> dict[str, str]:
    """`SLURM_JOB` with a port of its own, which else would be made of the job's number."""
    return SLURM_JOB | {"MASTER_PORT": str(free_port())}


def slurm_task(rank: int) -> dict[str, str]:
    """What srun tells one of them alone."""
    return {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}


def run(command: Sequence[str], cwd: Path, timeout: float = 120, **env: str) -> Ended:
    """A command to its end."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    return Ended(done.returncode, done.stdout)


Task = tuple[TrainConfig, tuple[TokenStore, TokenStore]]
"""A run, and the tokens of rank 0 and of the others."""


def train_together(processes: int, folder: Path, tasks: Sequence[Task]) -> None:
    """Trains runs one after the other, by the same processes, which start once for all of them."""
    told = folder / "tasks.pickle"
    folders = [(run, tuple(store.folder for store in stores)) for run, stores in tasks]
    told.write_bytes(pickle.dumps(folders))
    command = [*TORCHRUN, f"--nproc-per-node={processes}", str(WORKER), str(told)]
    ended = run(command, folder, timeout=400)
    assert ended.status == 0, ended.said[-5000:]
