"""Fixtures of tests of reports."""

from collections.abc import Callable
from pathlib import Path

import pytest
from report_runs import NAMES, train_runs

from tokengrow.data.store import TokenStore
from tokengrow.reports.run_data import RunRecord, read_runs
from tokengrow.training.config import TrainConfig


@pytest.fixture(scope="session")
def runs_folder(
    tiny_run: Callable[..., TrainConfig],
    store: TokenStore,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Return the directory of the six runs of `train_runs`; tests must not change it."""
    folder = tmp_path_factory.mktemp("report_runs")
    train_runs(folder, tiny_run, store)
    return folder


@pytest.fixture(scope="session")
def runs(runs_folder: Path) -> dict[str, RunRecord]:
    """Return the records of the six runs, by name."""
    records, skipped = read_runs([runs_folder / name for name in NAMES])
    assert not skipped
    return {run.name: run for run in records}
