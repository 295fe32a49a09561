"""Tests of the benchmarks: they run, check their results, and print rows."""

import csv
import os
import subprocess
import sys
from pathlib import Path

from tokengrow.data.store import TokenStore

ROOT = Path(__file__).parents[2]


def benchmark_rows(benchmark: str, *arguments: str, cwd: Path) -> list[dict[str, str]]:
    """Return the rows that `python -m benchmarks.BENCHMARK` prints."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{benchmark}", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return list(csv.DictReader(done.stdout.splitlines()))


def test_order_of_samples_is_timed_and_checked(tmp_path: Path) -> None:
    (row,) = benchmark_rows("megatron_order", "20000", "--epochs", "2", cwd=tmp_path)
    assert int(row["samples"]) == (int(row["tokens"]) - 1) // 2048
    assert float(row["seconds"]) > 0
    assert not list(tmp_path.iterdir()), "temporary files are removed"


def test_faults_are_counted(tmp_path: Path) -> None:
    tests = str(ROOT / "tests" / "training" / "test_nonfinite.py")
    arguments = ("-m", "fault", "-p", "no:cacheprovider", tests)
    rows = benchmark_rows("reliability", *arguments, cwd=tmp_path)
    assert all(row["survived"] == row["times"] for row in rows)
    (row,) = (row for row in rows if row["fault"] == "every gradient is NaN")
    assert (row["times"], row["survived"]) == ("1", "1")


def test_store_larger_than_memory_limit_is_read(tmp_path: Path) -> None:
    (row,) = benchmark_rows("store_memory", "0.4", "--room", "100", cwd=tmp_path)
    assert int(row["tokens"]) > 199_000_000
    assert float(row["grown_mb"]) < 50
    assert not list(tmp_path.iterdir()), "temporary files are removed"


def test_prunings_are_measured(source: Path, store: TokenStore, tmp_path: Path) -> None:
    rows = benchmark_rows("prune", str(source), str(store.folder), "--sequences", "2", cwd=tmp_path)
    assert len(rows) == 6 * 3 * (3 + 2 + 2 + 2)  # roles x shares x (rules for tau per ranking)
    assert all(float(row["kl"]) >= 0 for row in rows)
    assert len({row["loss_before"] for row in rows}) == 1


def test_scoring_methods_agree_and_are_timed(tmp_path: Path) -> None:
    sizes = "--context", "16", "--continuations", "1", "8", "--windows", "4", "--rounds", "2"
    rows = benchmark_rows("scoring", "150m", *sizes, cwd=tmp_path)
    assert [row["continuation"] for row in rows] == ["1", "8"]
    assert all(float(row["scored_s"]) > 0 < float(row["everywhere_s"]) for row in rows)
