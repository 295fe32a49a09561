"""SIGTERM in a run of several processes: one checkpoint, and every process exits with status 75."""

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from launchers import TOKENGROW, clean_environment, slurm_job, slurm_task

from tokengrow.checkpoint.layout import find_checkpoints
from tokengrow.cli.runner import STOPPED

pytestmark = pytest.mark.dist


@pytest.mark.fault("SIGTERM", "to one of two ranks", "both save together and exit with status 75")
def test_sigterm_to_one_rank_stops_both_with_status_75(
    train_arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    overrides = ("out=run", "stages.small.steps=100000", "checkpoint_every=100000")
    job = slurm_job()
    tasks = [
        subprocess.Popen(
            [*TOKENGROW, *train_arguments(*overrides)],
            cwd=tmp_path,
            env=clean_environment(**job, **slurm_task(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    output = tasks[0].stdout
    assert output is not None
    try:
        for line in output:
            if "step 5/" in line:
                break
        tasks[1].send_signal(signal.SIGTERM)  # only to rank 1
        for line in output:
            if "stopped by SIGTERM in stage small" in line:
                break
        # srun --kill-on-bad-exit sends SIGTERM to the other tasks milliseconds after the first one
        # has exited.
        tasks[0].send_signal(signal.SIGTERM)
        assert [task.wait(60) for task in tasks] == [STOPPED, STOPPED]
    finally:
        for task in tasks:
            task.kill()
            task.communicate()
    (folder,) = find_checkpoints(tmp_path / "run")
    assert f"the same command resumes from {Path('run') / folder.name}" in line
