"""Tests of reading runs for a report."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from report_runs import NAMES

from tokengrow.checkpoint.layout import COMPLETE, SESSIONS, TIMES, TRAIN_STATE, write_marker
from tokengrow.errors import UserError
from tokengrow.reports.comparison import comparability_notes
from tokengrow.reports.report import Report
from tokengrow.reports.run_data import PriorCost, RunRecord, read_runs

# One run


def newest_train_state(run: Path) -> dict[str, Any]:
    newest = sorted(run.glob("step_*"))[-1]
    state: dict[str, Any] = json.loads((newest / TRAIN_STATE).read_text())
    return state


def test_run_has_its_rungs_and_validations(runs: dict[str, RunRecord], runs_folder: Path) -> None:
    run, state = runs["grown"], newest_train_state(runs_folder / "grown")
    assert [rung.name for rung in run.rungs] == ["n8", "n12"]
    assert [rung.ends_at for rung in run.rungs] == [4, 8]
    assert [point.loss for point in run.points] == [row["loss"] for row in state["validation"]]
    assert [point.flops for point in run.points] == [row["flops"] for row in state["validation"]]
    assert (run.total_flops, run.status) == (state["flops"], "finished")
    seconds = [point.seconds for point in run.points]
    assert None not in seconds and seconds == sorted(seconds)


def test_cost_of_a_run_includes_its_source(runs: dict[str, RunRecord]) -> None:
    small, on = runs["small"], runs["on"]
    assert (on.prior_cost.tokens, on.prior_cost.flops) == (small.tokens, small.flops)
    assert on.points[0].flops == small.points[-1].flops
    assert on.total_flops == small.flops + on.flops
    assert on.prior_cost.seconds == small.seconds
    assert on.points[0].seconds > small.seconds


def test_cost_includes_a_source_before_growth_and_pruning(runs: dict[str, RunRecord]) -> None:
    small, after = runs["small"], runs["after"]
    assert (after.prior_cost.tokens, after.prior_cost.flops) == (small.tokens, small.flops)
    assert after.prior_cost.seconds == small.seconds


def test_run_without_times_sessions_and_source_is_read(runs_folder: Path, tmp_path: Path) -> None:
    # Older versions did not record these.
    run = shutil.copytree(runs_folder / "on", tmp_path / "on")
    (run / SESSIONS).unlink()
    (newest,) = run.glob("step_*")
    state = json.loads((newest / TRAIN_STATE).read_text())
    del state["source"]
    (newest / TRAIN_STATE).write_text(json.dumps(state))
    for name in (TIMES, COMPLETE):
        (newest / name).unlink()
    write_marker(newest)
    ((old,), _) = read_runs([run])
    assert old.prior_cost == PriorCost(tokens=None, flops=None, seconds=None)
    assert (old.seconds, old.sessions) == (None, ())
    assert {point.seconds for point in old.points} == {None}
    assert comparability_notes([old], []) == [
        "The cost of the source of on is not recorded. Its tokens and FLOPs count from its own "
        "start.",
        "The wall time of on is not recorded.",
    ]
    report = Report("on", [old], [])
    report.write(tmp_path / "report")
    assert not (tmp_path / "report" / "loss-vs-time.png").exists()


def test_unfinished_run_is_shown_up_to_its_newest_checkpoint(
    runs_folder: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(runs_folder / "grown", tmp_path / "grown")
    shutil.rmtree(run / "step_00000008")
    ((unfinished,), _) = read_runs([run])
    assert unfinished.status == "unfinished: after stage n8, 1 of 2"
    assert unfinished.points[-1].step == 4


def test_damaged_older_checkpoint_is_ignored(
    runs: dict[str, RunRecord], runs_folder: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(runs_folder / "grown", tmp_path / "grown")
    (run / "step_00000004" / COMPLETE).write_text("{")
    ((grown,), skipped) = read_runs([run])
    assert (grown.points, skipped) == (runs["grown"].points, [])
    assert sorted(grown.weights.values()) == [8]


# Several runs


def test_directory_of_runs_is_expanded(runs_folder: Path) -> None:
    records, skipped = read_runs([runs_folder])
    assert sorted(run.name for run in records) == sorted(NAMES)
    assert [(each.path.name, each.reason) for each in skipped] == [
        ("pruned", "its checkpoint was not written by a training run")
    ]


def test_run_without_a_checkpoint_is_skipped_with_a_note(runs_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("out: begun\n")
    records, skipped = read_runs([tmp_path / "begun", runs_folder / "small"])
    assert [run.name for run in records] == ["small"]
    assert [each.reason for each in skipped] == ["no complete checkpoint yet"]
    assert comparability_notes(records, skipped) == [
        f"Skipped: {tmp_path}/begun (no complete checkpoint yet)."
    ]


def test_no_run_with_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("out: begun\n")
    message = (
        r"runs must contain a run with a checkpoint, got none "
        r"\(.*begun: no complete checkpoint yet\)\. Give other runs\."
    )
    with pytest.raises(UserError, match=message):
        read_runs([tmp_path / "begun"])


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("none", r"which does not exist\. Give directories of runs\."),
        ("file", r"which is a file\. Give directories of runs\."),
        ("empty", r"which holds no run\. Give directories of runs, or"),
    ],
)
def test_path_without_runs_is_an_error(name: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"runs must be directories.*, got .*{name}, {problem}"):
        read_runs([tmp_path / name])


def test_run_given_twice_is_read_once_with_a_note(
    runs_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs_folder)
    records, skipped = read_runs([runs_folder / "small", Path("small")])
    assert len(records) == 1
    assert comparability_notes(records, skipped) == ["Skipped: small (given twice, shown once)."]


def test_steps_distinguish_checkpoints_of_one_run(runs_folder: Path) -> None:
    folders = [runs_folder / "grown" / f"step_0000000{step}" for step in (4, 8)]
    records, _ = read_runs([*folders, runs_folder / "small"])
    assert [run.name for run in records] == ["grown, step 4", "grown, step 8", "small"]
    assert [len(run.rungs) for run in records] == [1, 2, 1]
