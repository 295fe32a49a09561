"""A killed process: the job ends within a minute and reports the rank and the signal."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from launchers import TOKENGROW, TORCHRUN, clean_environment

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc to find ranks in"),
]

MAX_SECONDS = 60.0
"""Longest time from the kill to the end of the job."""


@contextmanager
def training_job(command: list[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a job and wait until it trains; kill all of its processes at the end."""
    with subprocess.Popen(
        command,
        cwd=folder,
        env=clean_environment(JOB_OF_THE_TEST=str(folder)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as job:
        assert job.stdout is not None
        try:
            for line in job.stdout:
                if "step 15/" in line:
                    break
            else:
                raise AssertionError("the job ended before step 15")
            yield job
        finally:
            for pid in live_processes(folder).values():
                os.kill(pid, signal.SIGKILL)


def live_processes(folder: Path) -> dict[str, int]:
    """Return the process ids of a job by local rank; the launcher has the key ''."""
    pids = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        env = dict(each.decode(errors="replace").partition("=")[::2] for each in variables)
        if env.get("JOB_OF_THE_TEST") == str(folder):
            pids[env.get("LOCAL_RANK", "")] = int(process.name)
    return pids


def kill_and_wait(job: subprocess.Popen[str], pid: int, folder: Path) -> str:
    """Kill one process of a job; return the output after that, once the job has ended in time."""
    assert job.stdout is not None
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    output = job.stdout.read()
    job.wait()
    assert time.monotonic() - killed < MAX_SECONDS
    assert not live_processes(folder), "all of them have ended"
    assert "tokengrow/training" not in output, "no traceback"
    return output


LONG_RUN = ("out=run", "stages.small.steps=100000")

LOST = "Lost contact with another process: "
SEE_OUTPUT = "its output, or that of its launcher, has the reason"


@pytest.mark.fault(
    "a rank is killed",
    "in a step, under torchrun",
    "the job ends within 60 s and reports the rank and the signal",
)
def test_torchrun_and_the_other_rank_report_a_killed_rank(
    train_arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    arguments = train_arguments(*LONG_RUN, "fabric=fsdp2")
    command = [*TORCHRUN, "--nproc-per-node=2", "-m", "tokengrow", *arguments]
    with training_job(command, tmp_path) as job:
        output = kill_and_wait(job, live_processes(tmp_path)["0"], tmp_path)
    assert job.returncode == 1
    assert f"tokengrow train (rank 1): {LOST}{SEE_OUTPUT}" in output
    table = output[output.index("FAILED") :]
    assert "rank      : 0 (local_rank: 0)\n  exitcode  : -9 " in table


@pytest.mark.fault("a rank is killed", "in a step, without a launcher", "the same")
def test_rank_0_reports_a_killed_child(
    train_arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    arguments = train_arguments(*LONG_RUN, "fabric=ddp", "fabric.devices=2")
    with training_job([*TOKENGROW, *arguments], tmp_path) as job:
        output = kill_and_wait(job, live_processes(tmp_path)["1"], tmp_path)
    assert job.returncode == 1
    assert f"tokengrow train: {LOST}rank 1 exited with signal SIGKILL. Checkpoints" in output


@pytest.mark.fault(
    "rank 0 is killed", "in a step, without a launcher", "the others end within 60 s"
)
def test_rank_1_ends_after_rank_0_is_killed(
    train_arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    arguments = train_arguments(*LONG_RUN, "fabric=ddp", "fabric.devices=2")
    with training_job([*TOKENGROW, *arguments], tmp_path) as job:
        output = kill_and_wait(job, job.pid, tmp_path)
    assert f"tokengrow train (rank 1): {LOST}{SEE_OUTPUT}" in output
