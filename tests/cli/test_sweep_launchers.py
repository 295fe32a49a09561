"""Sweeps whose jobs run elsewhere: beside each other, through submitit, chosen by Optuna."""

import csv
import os
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import slurm
import yaml

from tokengrow.data.store import TokenStore

Rows = list[dict[str, str]]
Sweep = Callable[..., tuple[Any, Rows]]


@pytest.fixture
def words(store: TokenStore, tmp_path: Path) -> list[str]:
    """A sweep of the recipe debug with one update a stage, into `tmp_path/sweep`."""
    tiny = ["recipes=debug", "model.vocab_size=512", "model.context_length=32", "fabric=cpu"]
    short = ["max_steps_per_stage=1", "validation_sequences=4", f"store={store.folder}"]
    return [*tiny, *short, f"out={tmp_path / 'sweep'}"]


@pytest.fixture
def sweep(program: Callable[..., Any], words: list[str], tmp_path: Path) -> Sweep:
    """`sweep(*overrides)`: as its user runs it; gives what it did and the rows of sweep.csv."""
    return lambda *more: (program("train", "-m", *words, *more), rows(tmp_path / "sweep"))


@pytest.fixture
def search(command: Callable[..., Any], words: list[str], tmp_path: Path) -> Sweep:
    """`search(*overrides)`: three trials for the learning rate, in this process."""
    lr = ["hparams_search=lr", "hydra.sweeper.n_trials=3"]
    return lambda *more: (command("train", *words, *lr, *more), rows(tmp_path / "sweep"))


def rows(folder: Path) -> Rows:
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.dist
def test_joblib_runs_jobs_beside_each_other(sweep: Sweep) -> None:
    outcome, table = sweep("seed=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert outcome.status == 0, outcome.err
    assert {(row["seed"], row["status"]) for row in table} == {("0", "done"), ("1", "done")}
    assert outcome.out.count("validation loss ") == 2
    assert "small  step" not in outcome.out, "two jobs would write through each other"


@pytest.mark.dist
def test_submitit_runs_jobs_in_processes_of_their_own(sweep: Sweep, tmp_path: Path) -> None:
    outcome, table = sweep("optim.lr=-1,1e-3", "hydra/launcher=submitit_local")
    assert outcome.status == 1, "a job failed"
    assert [row["status"] for row in table] == ["done", "failed"]
    logs = tmp_path / "sweep" / ".submitit"
    assert f"logs        {logs}" in outcome.out
    (log,) = [path for path in logs.rglob("*.out") if "small  step 1/1" in path.read_text()]
    assert f"validation loss {float(table[0]['loss']):.5f}" in log.read_text()


@pytest.mark.dist
@pytest.mark.skipif(sys.platform == "win32", reason="Slurm runs on Unix")
def test_slurm_starts_the_processes_of_each_job(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "srun", "sacct"):
        (tmp_path / "bin" / name).write_text(
            f'#!/bin/sh\nexec "{sys.executable}" "{slurm.__file__}" {name} "$@"\n'
        )
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    asked = {"tasks_per_node": 2, "timeout_min": 90, "partition": "short", "cpus_per_task": 1}
    outcome, (row,) = sweep(
        "seed=0",
        "hydra/launcher=submitit_slurm",
        *(f"hydra.launcher.{key}={value}" for key, value in asked.items()),
    )
    assert outcome.status == 0, outcome.out + outcome.err
    assert row["status"] == "done"
    (script,) = (tmp_path / "sweep" / ".submitit").rglob(f"{slurm.JOB_ID}_submission.sh")
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script.read_text(), re.MULTILINE))
    assert {key: options[key] for key in ("ntasks-per-node", "time", "partition", "job-name")} == {
        "ntasks-per-node": "2",
        "time": "90",
        "partition": "short",
        "job-name": "train",
    }
    # Both have trained the one run: a job that fails, of a folder that is taken say, returns None.
    results = list((tmp_path / "sweep" / ".submitit").rglob("*_result.pkl"))
    returned = [pickle.loads(path.read_bytes())[1].return_value for path in results]
    assert returned == [float(row["loss"])] * 2


def test_optuna_finds_the_best_row_of_the_table(search: Sweep, tmp_path: Path) -> None:
    outcome, table = search()
    assert outcome.status == 0, outcome.err
    found = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    assert len(table) == 3
    assert found["best_value"] == min(float(row["loss"]) for row in table)
    assert found["best_params"] == {"optim.lr": float(table[0]["optim.lr"])}


def test_the_same_search_asks_for_the_same_trials(search: Sweep, tmp_path: Path) -> None:
    _, (before,) = search("hydra.sweeper.n_trials=1")
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}
    _, after = search("hydra.sweeper.n_trials=2")
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert len(after) == 2
    assert before["optim.lr"] in {row["optim.lr"] for row in after}


def test_a_trial_that_fails_does_not_end_the_search(search: Sweep, tmp_path: Path) -> None:
    outcome, table = search("optim.lr=choice(-1,1e-3)", "hydra.sweeper.n_trials=4")
    assert outcome.status == 1
    assert [row["status"] for row in table] == ["done", "failed"]
    found = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    assert found["best_params"] == {"optim.lr": 1e-3}


def test_optuna_keeps_a_study_in_a_file(search: Sweep, tmp_path: Path) -> None:
    study = ["hydra.sweeper.study_name=lr", f"hydra.sweeper.storage=sqlite:///{tmp_path}/lr.db"]
    outcome, table = search(*study, "hydra.sweeper.n_trials=1")
    assert outcome.status == 0, outcome.err
    outcome, table = search(*study, "hydra.sweeper.n_trials=1", "hydra.sweeper.sampler.seed=1")
    assert (outcome.status, len(table)) == (0, 2)
