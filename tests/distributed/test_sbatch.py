"""The batch script in docs/slurm, with substitutes for srun and scontrol."""

import os
import subprocess
from pathlib import Path

import pytest
from launchers import CommandResult

from tokengrow.cli.runner import PEER_LOST, STOPPED

SCRIPT = Path(__file__).parents[2] / "docs" / "slurm" / "train.sbatch"
ARGUMENTS = ["recipes=quickstart", "name=two words"]


def run_script(folder: Path, status: int) -> tuple[CommandResult, list[str]]:
    """Run the script with an srun that exits with a status.

    Returns:
        The result, and the commands that the script called, each word in brackets.
    """
    for name in ("srun", "scontrol"):
        program, exit_status = folder / name, status if name == "srun" else 0
        record = f'{{ printf "[%s]" {name} "$@"; echo; }} >> calls'
        program.write_text(f"#!/bin/bash\n{record}\nexit {exit_status}\n")
        program.chmod(0o755)
    job = {"SLURM_JOB_ID": "4711", "SLURM_CPUS_PER_TASK": "8"}
    done = subprocess.run(
        ["bash", str(SCRIPT), *ARGUMENTS],
        cwd=folder,
        env=os.environ | job | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    result = CommandResult(done.returncode, done.stdout)
    return result, (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize("status", [0, PEER_LOST, STOPPED])
def test_only_a_stopped_job_is_requeued(tmp_path: Path, status: int) -> None:
    result, (training, *requeued) = run_script(tmp_path, status)
    assert training.startswith("[srun][--cpus-per-task=8]")
    assert training.endswith("[tokengrow][train][recipes=quickstart][name=two words]")
    assert requeued == (["[scontrol][requeue][4711]"] if status == STOPPED else [])
    assert result.returncode == status
