"""One of two processes is killed in the middle of a stage: the job ends, and says which one it
was."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ranks import TOKENGROW, TORCHRUN, environment

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc to find ranks in"),
]

WITHIN = 60.0
"""Seconds in which the job has to end."""


@contextmanager
def in_the_middle(command: list[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A job that is training; nothing of it is left after the block."""
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment(JOB_OF_THE_TEST=str(folder)),
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
                raise AssertionError("it has not come so far")
            yield job
        finally:
            for pid in processes(folder).values():
                os.kill(pid, signal.SIGKILL)


def processes(folder: Path) -> dict[str, int]:
    """Process ids of a job that are alive, by local rank; that of what started them by ''."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        env = dict(each.decode(errors="replace").partition("=")[::2] for each in variables)
        if env.get("JOB_OF_THE_TEST") == str(folder):
            found[env.get("LOCAL_RANK", "")] = int(process.name)
    return found


def after_a_kill(job: subprocess.Popen[str], victim: int, folder: Path) -> str:
    """What a job still says once one of its processes is killed; it ends in time."""
    assert job.stdout is not None
    killed = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    said = job.stdout.read()
    job.wait()
    assert time.monotonic() - killed < WITHIN
    assert not processes(folder), "all of them have ended"
    assert "tokengrow/training" not in said, "no traceback"
    return said


@pytest.mark.fault(
    "a rank is killed",
    "in a step, under torchrun",
    "the job ends within 60 s, and which rank and signal is said",
)
def test_torchrun_names_the_rank_and_the_others_say_that_it_is_gone(
    arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    words = arguments("out=run", "stages.small.steps=100000", "fabric=fsdp2")
    command = [*TORCHRUN, "--nproc-per-node=2", "-m", "tokengrow", *words]
    with in_the_middle(command, tmp_path) as job:
        said = after_a_kill(job, processes(tmp_path)["0"], tmp_path)
    assert job.returncode == 1
    assert "tokengrow train (rank 1): lost contact with another process: its own output" in said
    table = said[said.index("FAILED") :]
    assert "rank      : 0 (local_rank: 0)\n  exitcode  : -9 " in table


@pytest.mark.fault("a rank is killed", "in a step, without a launcher", "likewise")
def test_without_a_launcher_rank_0_names_the_rank(
    arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    words = arguments("out=run", "stages.small.steps=100000", "fabric=ddp", "fabric.devices=2")
    with in_the_middle([*TOKENGROW, *words], tmp_path) as job:
        said = after_a_kill(job, processes(tmp_path)["1"], tmp_path)
    assert job.returncode == 1
    lost = "lost contact with another process: rank 1 has ended with signal SIGKILL; checkpoints"
    assert f"tokengrow train: {lost}" in said


@pytest.mark.fault(
    "rank 0 is killed", "in a step, without a launcher", "the others end within 60 s"
)
def test_without_a_launcher_rank_1_does_not_outlive_rank_0(
    arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    words = arguments("out=run", "stages.small.steps=100000", "fabric=ddp", "fabric.devices=2")
    with in_the_middle([*TOKENGROW, *words], tmp_path) as job:
        said = after_a_kill(job, job.pid, tmp_path)
    assert "tokengrow train (rank 1): lost contact with another process: its own output" in said
