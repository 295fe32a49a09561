"""The batch script in docs/slurm, with programs that stand for Slurm's own."""

import os
import subprocess
from pathlib import Path

import pytest
from ranks import Ended

from tokengrow.cli.runner import PEER_LOST, STOPPED

SCRIPT = Path(__file__).parents[2] / "docs" / "slurm" / "train.sbatch"
WORDS = ["recipes=quickstart", "name=two words"]


def submitted(folder: Path, status: int) -> tuple[Ended, list[str]]:
    """What the script does whose tasks end with a status, and its calls, a word in brackets."""
    for name in ("srun", "scontrol"):
        program, leaves = folder / name, status if name == "srun" else 0
        noted = f'{{ printf "[%s]" {name} "$@"; echo; }} >> calls'
        program.write_text(f"#!/bin/bash\n{noted}\nexit {leaves}\n")
        program.chmod(0o755)
    job = {"SLURM_JOB_ID": "4711", "SLURM_CPUS_PER_TASK": "8"}
    done = subprocess.run(
        ["bash", str(SCRIPT), *WORDS],
        cwd=folder,
        env=os.environ | job | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    return Ended(done.returncode, done.stdout), (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize("status", [0, PEER_LOST, STOPPED])
def test_a_job_that_was_stopped_in_time_is_queued_again_and_no_other(
    tmp_path: Path, status: int
) -> None:
    ended, (training, *queued) = submitted(tmp_path, status)
    assert training.startswith("[srun][--cpus-per-task=8]")
    assert training.endswith("[tokengrow][train][recipes=quickstart][name=two words]")
    assert queued == (["[scontrol][requeue][4711]"] if status == STOPPED else [])
    assert ended.status == status
