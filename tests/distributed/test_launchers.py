"""Every way of starting several processes: one run, in one folder, that rank 0 writes."""

import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ranks import TOKENGROW, Ended, free_port, run, slurm_job, slurm_task

from tokengrow.checkpoint.layout import find_checkpoints
from tokengrow.checkpoint.store import load_checkpoint

pytestmark = pytest.mark.dist

Arguments = Callable[..., list[str]]


def the_run(folder: Path) -> Path:
    """The one run in a folder of dry runs, which is whole."""
    (out,) = (folder / "runs" / "dry-run").iterdir()
    _at_the_growth, last = find_checkpoints(out)
    assert load_checkpoint(last).train_state.step == 4
    assert [path.name for path in (out / "logs").iterdir()] == ["version_0"]
    return out


def said_once(ended: Ended) -> None:
    assert ended.status == 0, ended.said
    for line in ("step 2/2  loss", "grown ", "Validation loss up the ladder", "\ncheckpoint "):
        expected = 2 if line == "step 2/2  loss" else 1
        assert ended.said.count(line) == expected, ended.said


def test_fabric_starts_the_others_by_the_same_command_line(
    arguments: Arguments, tmp_path: Path
) -> None:
    # The verb, --config-dir, and a key of a stage that the recipe does not have.
    words = arguments("debug=dry_run", "fabric=ddp", "fabric.devices=2", "stages.small.optim.lr=1")
    ended = run([*TOKENGROW, *words], tmp_path)
    said_once(ended)
    assert load_checkpoint(the_run(tmp_path)).run.stages["small"].optim["lr"] == 1


def test_fabric_run_starts_the_command(arguments: Arguments, tmp_path: Path) -> None:
    scripts = Path(sysconfig.get_path("scripts"))
    launcher = [str(scripts / "fabric"), "run", "--accelerator=cpu", "--strategy=ddp"]
    launcher += ["--devices=2", f"--main-port={free_port()}", str(scripts / "tokengrow")]
    words = [word for word in arguments("debug=dry_run") if word != "fabric.accelerator=cpu"]
    said_once(run([*launcher, *words], tmp_path))
    assert load_checkpoint(the_run(tmp_path)).run.settings["fabric"]["strategy"] == "ddp"


def test_srun_starts_one_run_in_one_folder_by_whatever_clock(
    arguments: Arguments, tmp_path: Path
) -> None:
    job = slurm_job()

    def task(rank: int) -> Ended:
        # A rank that starts a second later reads another time for the name of its folder.
        out = f"out=runs/dry-run/{rank}-${{now:%H%M%S}}"
        words = arguments("debug=dry_run", "fabric=fsdp2", out)
        return run([*TOKENGROW, *words], tmp_path, **job, **slurm_task(rank))

    with ThreadPoolExecutor(2) as tasks:
        first, second = tasks.map(task, (0, 1))
    said_once(first)
    assert second == Ended(0, ""), "it trains, and rank 0 speaks"
    assert the_run(tmp_path).name.startswith("0-")


def test_a_wrong_input_is_one_sentence_of_each_rank_and_nothing_is_written(
    arguments: Arguments, tmp_path: Path
) -> None:
    words = arguments("micro_batch_size=4", "out=run", "fabric=ddp", "fabric.devices=2")
    ended = run([*TOKENGROW, *words], tmp_path)
    assert ended.status == 2
    for rank in ("", " (rank 1)"):
        said = f"tokengrow train{rank}: batch_size (4) is not a multiple of micro_batch_size x "
        assert ended.said.count(said) == 1, ended.said
    assert ended.said.count("\n") == 2, "and nothing else"
    assert not (tmp_path / "run").exists()
