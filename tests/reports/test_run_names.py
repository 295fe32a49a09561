"""Tests of the names of runs in a report."""

from pathlib import Path

import pytest

from tokengrow.reports.run_names import run_names, short_run_names


def test_parents_distinguish_runs_with_the_same_name() -> None:
    assert run_names([Path("a/large"), Path("b/large")]) == ["a/large", "b/large"]
    assert run_names([Path("a/small"), Path("b/large")]) == ["small", "large"]


@pytest.mark.parametrize(
    ("names", "short"),
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
def test_jobs_of_a_sweep_are_named_by_their_differences(names: list[str], short: list[str]) -> None:
    assert short_run_names(names) == short


def test_parents_distinguish_two_sweeps_with_the_same_jobs() -> None:
    folders = [Path(sweep, f"seed={seed}") for sweep in "ab" for seed in (1, 2)]
    assert run_names(folders) == ["a/1", "a/2", "b/1", "b/2"]
