"""Launchers of several processes: each starts one run, in one directory, written by rank 0."""

import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from launchers import TOKENGROW, CommandResult, free_port, run, slurm_job, slurm_task

from tokengrow.checkpoint.layout import find_checkpoints
from tokengrow.checkpoint.store import load_checkpoint

pytestmark = pytest.mark.dist

TrainArguments = Callable[..., list[str]]


def only_run(folder: Path) -> Path:
    """Return the only run in a folder of dry runs, after a check that it is complete."""
    (out,) = (folder / "runs" / "dry-run").iterdir()
    _at_the_growth, last = find_checkpoints(out)
    assert load_checkpoint(last).train_state.step == 4
    assert [path.name for path in (out / "logs").iterdir()] == ["version_0"]
    return out


def assert_printed_once(result: CommandResult) -> None:
    """Assert that a command succeeded, and that only one rank printed its progress."""
    assert result.returncode == 0, result.output
    for line in ("step 2/2  loss", "grown ", "Validation loss of each rung", "\ncheckpoint "):
        expected = 2 if line == "step 2/2  loss" else 1
        assert result.output.count(line) == expected, result.output


def test_fabric_starts_children_with_the_same_arguments(
    train_arguments: TrainArguments, tmp_path: Path
) -> None:
    # The arguments hold the verb, --config-dir, and a key of a stage that the recipe lacks.
    overrides = ("fabric=ddp", "fabric.devices=2", "stages.small.optim.lr=1")
    result = run([*TOKENGROW, *train_arguments("debug=dry_run", *overrides)], tmp_path)
    assert_printed_once(result)
    assert load_checkpoint(only_run(tmp_path)).run.stages["small"].optim["lr"] == 1


def test_fabric_run_starts_the_command(train_arguments: TrainArguments, tmp_path: Path) -> None:
    scripts = Path(sysconfig.get_path("scripts"))
    launcher = [str(scripts / "fabric"), "run", "--accelerator=cpu", "--strategy=ddp"]
    launcher += ["--devices=2", f"--main-port={free_port()}", str(scripts / "tokengrow")]
    arguments = train_arguments("debug=dry_run")
    arguments.remove("fabric.accelerator=cpu")
    assert_printed_once(run([*launcher, *arguments], tmp_path))
    assert load_checkpoint(only_run(tmp_path)).run.settings["fabric"]["strategy"] == "ddp"


def test_srun_tasks_share_one_run_directory(
    train_arguments: TrainArguments, tmp_path: Path
) -> None:
    job = slurm_job()

    def task(rank: int) -> CommandResult:
        # A rank that starts a second later resolves another time in the name of its directory.
        out = f"out=runs/dry-run/{rank}-${{now:%H%M%S}}"
        arguments = train_arguments("debug=dry_run", "fabric=fsdp2", out)
        return run([*TOKENGROW, *arguments], tmp_path, **job, **slurm_task(rank))

    with ThreadPoolExecutor(2) as tasks:
        first, second = tasks.map(task, (0, 1))
    assert_printed_once(first)
    assert second == CommandResult(0, ""), "it trains, and only rank 0 prints"
    assert only_run(tmp_path).name.startswith("0-")


def test_wrong_input_is_one_message_per_rank(
    train_arguments: TrainArguments, tmp_path: Path
) -> None:
    overrides = ("micro_batch_size=4", "out=run", "fabric=ddp", "fabric.devices=2")
    result = run([*TOKENGROW, *train_arguments(*overrides)], tmp_path)
    assert result.returncode == 2
    for rank in ("", " (rank 1)"):
        message = f"tokengrow train{rank}: batch_size must be a multiple of micro_batch_size x "
        assert result.output.count(message) == 1, result.output
    assert result.output.count("\n") == 2, "and nothing else"
    assert not (tmp_path / "run").exists()
