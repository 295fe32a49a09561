"""SIGTERM to several processes: one checkpoint, and the status of every one of them says so."""

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import TOKENGROW, environment, slurm_job, slurm_task

from tokengrow.checkpoint.layout import find_checkpoints
from tokengrow.cli.runner import STOPPED

pytestmark = pytest.mark.dist


@pytest.mark.fault("SIGTERM", "to one of two ranks", "both save together and leave with status 75")
def test_the_first_process_to_leave_does_not_spoil_the_status_of_the_others(
    arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    words = arguments("out=run", "stages.small.steps=100000", "checkpoint_every=100000")
    job = slurm_job()
    tasks = [
        subprocess.Popen(
            [*TOKENGROW, *words],
            cwd=tmp_path,
            env=environment(**job, **slurm_task(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = tasks[0].stdout
    assert said is not None
    try:
        for line in said:
            if "step 5/" in line:
                break
        tasks[1].send_signal(signal.SIGTERM)  # one of them alone is asked
        for line in said:
            if "stopped by SIGTERM in stage small" in line:
                break
        # srun --kill-on-bad-exit asks those that are left once one has ended, in milliseconds.
        tasks[0].send_signal(signal.SIGTERM)
        assert [task.wait(60) for task in tasks] == [STOPPED, STOPPED]
    finally:
        for task in tasks:
            task.kill()
            task.communicate()
    (folder,) = find_checkpoints(tmp_path / "run")
    assert f"the same command resumes from {Path('run') / folder.name}" in line
