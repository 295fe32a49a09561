"""What a report reads of runs, and what it finds out of them beside each other."""

import csv
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from arms import make_arms, record

from tokengrow.checkpoint.layout import COMPLETE, SESSIONS, TIMES, TRAIN_STATE, write_marker
from tokengrow.data.store import TokenStore
from tokengrow.errors import UserError
from tokengrow.reports.comparison import Branch, config_differences, lineage_tree, notes
from tokengrow.reports.report import Report, points_csv
from tokengrow.reports.run_data import RunRecord, Spent, read_runs, run_names, short_run_names
from tokengrow.training.config import TrainConfig

NAMES = ("small", "grown", "scratch", "on", "published", "after")


@pytest.fixture(scope="module")
def arms(
    tiny_run: Callable[..., TrainConfig],
    store: TokenStore,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder of six runs; not to be written to."""
    folder = tmp_path_factory.mktemp("arms")
    make_arms(folder, tiny_run, store)
    return folder


@pytest.fixture(scope="module")
def runs(arms: Path) -> dict[str, RunRecord]:
    """They, as they are read."""
    read, left_out = read_runs([arms / name for name in NAMES])
    assert not left_out
    return {run.name: run for run in read}


# One run


def state_of(run: Path) -> dict[str, Any]:
    newest = sorted(run.glob("step_*"))[-1]
    state: dict[str, Any] = json.loads((newest / TRAIN_STATE).read_text())
    return state


def test_a_run_is_read_with_its_rungs_and_validations(
    runs: dict[str, RunRecord], arms: Path
) -> None:
    run, state = runs["grown"], state_of(arms / "grown")
    assert [rung.name for rung in run.rungs] == ["n8", "n12"]
    assert [rung.ends_at for rung in run.rungs] == [4, 8]
    assert [point.loss for point in run.points] == [row["loss"] for row in state["validation"]]
    assert [point.flops for point in run.points] == [row["flops"] for row in state["validation"]]
    assert (run.total_flops, run.stands) == (state["flops"], "finished")
    seconds = [point.seconds for point in run.points]
    assert None not in seconds and seconds == sorted(seconds)


def test_the_cost_of_a_run_includes_what_lies_behind_its_source(
    runs: dict[str, RunRecord],
) -> None:
    small, on = runs["small"], runs["on"]
    assert (on.before.tokens, on.before.flops) == (small.tokens, small.flops)
    assert on.points[0].flops == small.points[-1].flops
    assert on.total_flops == small.flops + on.flops
    assert on.before.seconds == small.seconds
    assert on.points[0].seconds > small.seconds


def test_it_does_so_through_a_growth_and_a_pruning_outside_of_any_run(
    runs: dict[str, RunRecord],
) -> None:
    small, after = runs["small"], runs["after"]
    assert (after.before.tokens, after.before.flops) == (small.tokens, small.flops)
    assert after.before.seconds == small.seconds


def test_a_run_of_before_times_sessions_and_sources_were_kept_is_read(
    arms: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(arms / "on", tmp_path / "on")
    (run / SESSIONS).unlink()
    (newest,) = run.glob("step_*")
    state = json.loads((newest / TRAIN_STATE).read_text())
    del state["source"]
    (newest / TRAIN_STATE).write_text(json.dumps(state))
    for name in (TIMES, COMPLETE):
        (newest / name).unlink()
    write_marker(newest)
    ((old,), _) = read_runs([run])
    assert old.before == Spent(tokens=None, flops=None, seconds=None)
    assert (old.seconds, old.sessions) == (None, ())
    assert {point.seconds for point in old.points} == {None}
    assert notes([old], []) == [
        "What lies behind the source of on is not recorded: its tokens and FLOPs count from its "
        "own start.",
        "The wall time of on is not recorded.",
    ]
    report = Report("on", [old], [])
    report.write(tmp_path / "report")
    assert not (tmp_path / "report" / "loss-vs-time.png").exists()


def test_a_run_in_progress_is_shown_up_to_its_newest_checkpoint(
    tiny_run: Callable[..., TrainConfig], store: TokenStore, arms: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(arms / "grown", tmp_path / "grown")
    shutil.rmtree(run / "step_00000008")
    ((begun,), _) = read_runs([run])
    assert begun.stands == "unfinished: after stage n8, 1 of 2"
    assert begun.points[-1].step == 4


def test_a_damaged_checkpoint_before_the_newest_one_is_no_obstacle(
    runs: dict[str, RunRecord], arms: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(arms / "grown", tmp_path / "grown")
    (run / "step_00000004" / COMPLETE).write_text("{")
    ((grown,), left_out) = read_runs([run])
    assert (grown.points, left_out) == (runs["grown"].points, [])
    assert sorted(grown.weights.values()) == [8]


# Several runs


def test_a_folder_of_runs_stands_for_all_of_them(arms: Path) -> None:
    read, left_out = read_runs([arms])
    assert sorted(run.name for run in read) == sorted(NAMES)
    assert [(each.path.name, each.reason) for each in left_out] == [
        ("pruned", "its checkpoint was written by no run: nothing was trained there")
    ]


def test_a_run_without_a_checkpoint_is_left_out_and_named(arms: Path, tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("out: begun\n")
    read, left_out = read_runs([tmp_path / "begun", arms / "small"])
    assert [run.name for run in read] == ["small"]
    assert [each.reason for each in left_out] == ["no whole checkpoint yet"]
    assert notes(read, left_out) == [f"Left out: {tmp_path}/begun (no whole checkpoint yet)."]


def test_no_run_at_all_is_refused(tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("out: begun\n")
    with pytest.raises(UserError, match=r"nothing to report on .*begun: no whole checkpoint yet"):
        read_runs([tmp_path / "begun"])


@pytest.mark.parametrize(("name", "why"), [("none", "does not exist"), ("empty", "is no run")])
def test_a_path_that_is_no_run_is_refused(name: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"runs names .*{name}, which {why}"):
        read_runs([tmp_path / name])


def test_a_run_that_is_named_twice_is_read_once_and_that_is_said(
    arms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(arms)
    read, left_out = read_runs([arms / "small", Path("small")])
    assert len(read) == 1
    assert notes(read, left_out) == ["Left out: small (named twice, shown once)."]


def test_checkpoints_of_one_run_are_told_apart_by_their_steps(arms: Path) -> None:
    folders = [arms / "grown" / f"step_0000000{step}" for step in (4, 8)]
    read, _ = read_runs([*folders, arms / "small"])
    assert [run.name for run in read] == ["grown, step 4", "grown, step 8", "small"]
    assert [len(run.rungs) for run in read] == [1, 2, 1]


def test_runs_of_one_name_are_told_apart_by_their_parents() -> None:
    assert run_names([Path("a/large"), Path("b/large")]) == ["a/large", "b/large"]
    assert run_names([Path("a/small"), Path("b/large")]) == ["small", "large"]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["arm=grown", "arm=small"], ["grown", "small"]),
        (
            ["optim.lr=0.0003,model.layers=2", "optim.lr=0.0006,model.layers=4"],
            ["lr=0.0003,layers=2", "lr=0.0006,layers=4"],
        ),
        (
            ["optim.lr=0.0003,model.layers=2", "optim.lr=0.0006,model.layers=2"],
            ["0.0003", "0.0006"],
        ),
        (
            ["stages.a.steps=1,stages.b.steps=2", "stages.a.steps=2,stages.b.steps=1"],
            ["stages.a.steps=1,stages.b.steps=2", "stages.a.steps=2,stages.b.steps=1"],
        ),
        (["data.mix=[1,2],seed=0", "data.mix=[2,1],seed=0"], ["[1,2]", "[2,1]"]),
        (["arm=grown", "scratch"], ["arm=grown", "scratch"]),
        (["arm=grown", "arm=grown"], ["arm=grown", "arm=grown"]),
    ],
)
def test_the_jobs_of_a_sweep_are_called_by_what_tells_them_apart(
    names: list[str], told: list[str]
) -> None:
    assert short_run_names(names) == told


def test_of_two_sweeps_with_the_same_jobs_both_are_named() -> None:
    folders = [Path(sweep, f"seed={seed}") for sweep in "ab" for seed in (1, 2)]
    assert run_names(folders) == ["a/1", "a/2", "b/1", "b/2"]


def test_the_points_are_a_csv_file(runs: dict[str, RunRecord]) -> None:
    rows = list(csv.DictReader(io.StringIO(points_csv(list(runs.values())).decode())))
    assert len(rows) == sum(len(run.points) for run in runs.values())
    row, point = rows[-1], runs["after"].points[-1]
    assert (row["run"], row["rung"], int(row["step"])) == ("after", "n12", 4)
    assert (float(row["flops"]), float(row["loss"])) == (point.flops, point.loss)


# What differs between the recipes


def differing(*names: str, runs: dict[str, RunRecord]) -> dict[str, tuple[str | None, ...]]:
    found = config_differences([runs[name] for name in names])
    return {each.key: each.values for each in found}


def test_what_differs_between_two_recipes_is_listed(runs: dict[str, RunRecord]) -> None:
    found = differing("grown", "scratch", runs=runs)
    assert found["seed"] == ("0", "1")
    assert found["stages"] == ("n8: 4 steps, then n12: 4 steps", "n12: 6 steps")
    assert found["stages.n12.steps"] == ("4", "6")
    assert not any(key.startswith("stages.n8.") or key == "out" for key in found)


def test_the_growth_of_the_published_arm_is_what_differs(runs: dict[str, RunRecord]) -> None:
    assert differing("grown", "published", runs=runs) == {
        "growth.init": ("zero_key", "published"),
        "growth.optimizer": ("carry", "fresh"),
        "growth.tolerance": ("null", "inf"),
    }


def test_a_key_that_only_one_of_two_stages_of_a_name_has_is_a_difference() -> None:
    sizes = {"large": {"steps": 4, "model": {"context_length": 8, "tau": {"ffn": 2.0}}}}
    other = {"large": {"steps": 4, "model": {"context_length": 8, "architecture": "transformer"}}}
    one, two = (
        record(name, (1e3, 4.0), config={"stages": stages})
        for name, stages in (("tokenformer", sizes), ("transformer", other))
    )
    assert {each.key: each.values for each in config_differences([one, two])} == {
        "stages.large.model.tau.ffn": ("2", None),
        "stages.large.model.architecture": (None, "transformer"),
    }


# Lineage


def named(branches: list[Branch], runs: list[RunRecord]) -> dict[str, Any]:
    """The tree as {run: {its sizes: the runs on them}}."""
    return {
        runs[branch.run].name: [
            (twig.text.partition(":")[0], named(twig.branches, runs)) for twig in branch.twigs
        ]
        for branch in branches
    }


def test_a_run_hangs_on_the_size_that_it_goes_on_from(runs: dict[str, RunRecord]) -> None:
    shown = [runs[name] for name in ("small", "on", "after", "scratch")]
    large = runs["grown"].rungs[1].parameters
    pruned = large - 2 * (24 - 20) * (32 + 32)  # layers, tokens of the FFN, key and value
    assert named(lineage_tree(shown), shown) == {
        "small": [
            (
                "n8",
                {
                    "on": [("n8", {})],
                    "after": [
                        (f"{large:,} parameters, outside of any run", {}),
                        (f"{pruned:,} parameters, outside of any run", {}),
                        ("n12", {}),
                    ],
                },
            )
        ],
        "scratch": [("n12", {})],
    }


def test_growths_and_prunings_are_named_with_what_they_changed(
    runs: dict[str, RunRecord],
) -> None:
    shown = [runs["small"], runs["after"]]
    (root,) = lineage_tree(shown)
    (after,) = root.twigs[0].branches
    grown, pruned, trained = (twig.growth for twig in after.twigs)
    assert grown is not None and pruned is not None
    sizes = "grown: tokens.query, key, value, output 8 → 12; tokens.ffn 16 → 24; largest |Δ logit| "
    assert grown.startswith(sizes)
    assert pruned.startswith("pruned: tokens.ffn 24 → 20; ")
    assert trained is None
    assert after.start == "from small, step 4"


def test_of_runs_with_the_same_weights_it_is_the_one_that_was_named(
    runs: dict[str, RunRecord],
) -> None:
    # grown begins as small: the same recipe, the same seed, the same bits.
    assert set(runs["small"].weights) < set(runs["grown"].weights)
    shown = [runs["grown"], runs["small"], runs["on"]]
    tree = named(lineage_tree(shown), shown)
    assert tree["small"] == [("n8", {"on": [("n8", {})]})]


def test_a_source_that_is_not_among_the_runs_is_named(
    runs: dict[str, RunRecord], arms: Path
) -> None:
    (root,) = lineage_tree([runs["on"]])
    assert root.start == f"from {arms}/small, which is not among these runs"


def test_a_run_that_noted_no_hash_is_found_by_its_path(runs: dict[str, RunRecord]) -> None:
    shown = [runs["small"], replace(runs["on"], source=None)]
    assert named(lineage_tree(shown), shown) == {"small": [("n8", {"on": [("n8", {})]})]}


# What to know before numbers are compared


def test_runs_that_were_validated_on_other_tokens_are_not_compared_in_silence() -> None:
    one = record("one", (1e3, 4.0))
    better = record("better", (1e3, 3.9))
    other = replace(better, name="other", fingerprint="of others")
    assert notes([one, better], []) == []
    (said,) = notes([one, other], [])
    assert said.startswith("The runs were not all validated on the same tokens")


def test_runs_on_different_devices_are_not_timed_against_each_other_in_silence() -> None:
    cpu, gpu = ({"device": name, "processes": 1} for name in ("CPU (1 thread)", "NVIDIA H100"))
    one = record("one", (1e3, 4.0), sessions=(cpu,))
    other = record("other", (1e3, 3.9), sessions=(gpu,))
    (said,) = notes([one, other], [])
    assert said == "The runs were trained on different devices: their wall times do not compare."


def test_lines_that_lie_on_each_other_are_said() -> None:
    one = record("one", (1e3, 4.0), (2e3, 3.5))
    same, longer = replace(one, name="same"), record("longer", (1e3, 4.0), (2e3, 3.5), (3e3, 3.4))
    assert notes([one, same, longer], []) == [
        "one and same have the same losses at the same costs: one line of the figures lies on the "
        "other."
    ]


def test_the_facts_are_json(runs: dict[str, RunRecord]) -> None:
    values = json.loads(json.dumps(Report("six", list(runs.values()), []).values()))
    assert [run["name"] for run in values["runs"]] == list(NAMES)
    grown = values["runs"][1]
    assert grown["rungs"][1]["loss_before"] == grown["rungs"][0]["loss_end"]
    assert grown["total_flops"] == runs["grown"].flops
    # The last size alone on all tokens: FLOPs per token of n12, times the tokens of both stages.
    assert grown["flops_at_last_size"] == pytest.approx(2 * grown["rungs"][1]["flops"])
    assert len(values["ratios"]) == len(NAMES)
