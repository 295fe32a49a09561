"""Commands that run in several processes, started as the launchers start them."""

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

TRAIN_WORKER = Path(__file__).parent / "train_worker.py"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
TOKENGROW = (sys.executable, "-m", "tokengrow")
LAUNCHER_VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK"),
)

SLURM_JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "ladder",
    "SLURM_NODELIST": "127.0.0.1",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_NNODES": "1",
    "SLURM_NODEID": "0",
}
"""Environment of two srun tasks on one node; Slurm 22.05 sets no SLURM_NTASKS_PER_NODE."""


@dataclass(frozen=True)
class CommandResult:
    """Result of a command."""

    returncode: int
    """Exit status."""
    output: str
    """Its stdout and stderr, interleaved."""


def clean_environment(**variables: str) -> dict[str, str]:
    """Return the environment of a process on the CPU that no launcher has started."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    kept |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return kept | variables


def free_port() -> int:
    """Return a free port, because several tests may run at the same time."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def slurm_job() -> dict[str, str]:
    """Return `SLURM_JOB` with a free port; the default port depends only on the job's number."""
    return SLURM_JOB | {"MASTER_PORT": str(free_port())}


def slurm_task(rank: int) -> dict[str, str]:
    """Return the variables that srun sets for one task."""
    return {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}


def run(command: Sequence[str], cwd: Path, timeout: float = 120, **variables: str) -> CommandResult:
    """Run a command to its end."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=clean_environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    return CommandResult(done.returncode, done.stdout)


Task = tuple[TrainConfig, tuple[TokenStore, TokenStore]]
"""A run, and the tokens of rank 0 and of the other ranks."""


def train_distributed(processes: int, folder: Path, tasks: Sequence[Task]) -> None:
    """Train runs one after the other in the same processes, which start only once."""
    task_file = folder / "tasks.pickle"
    folders = [(run, tuple(store.folder for store in stores)) for run, stores in tasks]
    task_file.write_bytes(pickle.dumps(folders))
    command = [*TORCHRUN, f"--nproc-per-node={processes}", str(TRAIN_WORKER), str(task_file)]
    result = run(command, folder, timeout=400)
    assert result.returncode == 0, result.output[-5000:]
