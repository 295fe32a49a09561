"""The benchmarks run, check what they time, and print rows."""

import csv
import os
import subprocess
import sys
from pathlib import Path

from tokengrow.data.store import TokenStore

ROOT = Path(__file__).parents[2]


def local_rows(benchmark: str, *arguments: str, cwd: Path) -> list[dict[str, str]]:
    """What `python -m benchmarks.{benchmark}` prints."""
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


def test_the_order_of_samples_is_timed_and_checked(tmp_path: Path) -> None:
    (row,) = local_rows("megatron_order", "20000", "--epochs", "2", cwd=tmp_path)
    assert int(row["samples"]) == (int(row["tokens"]) - 1) // 2048
    assert float(row["seconds"]) > 0
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_faults_are_counted_by_what_the_tests_break(tmp_path: Path) -> None:
    tests = str(ROOT / "tests" / "training" / "test_finite.py")
    chosen = ("-m", "fault", "-k", "too_many_in_a_row", "-p", "no:cacheprovider", tests)
    (row,) = local_rows("reliability", *chosen, cwd=tmp_path)
    assert (row["fault"], row["times"], row["survived"]) == ("every gradient is NaN", "1", "1")


def test_a_store_larger_than_the_memory_allowed_is_read_whole(tmp_path: Path) -> None:
    (row,) = local_rows("store_memory", "0.4", "--room", "100", cwd=tmp_path)
    assert int(row["tokens"]) > 199_000_000
    assert float(row["grown_mb"]) < 50
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_every_pruning_is_measured(source: Path, store: TokenStore, tmp_path: Path) -> None:
    rows = local_rows("prune", str(source), str(store.folder), "--sequences", "2", cwd=tmp_path)
    assert len(rows) == 6 * 3 * (3 + 2 + 2 + 2)  # roles, shares, tau under each ranking
    assert all(float(row["kl"]) >= 0 for row in rows)
    assert len({row["loss_before"] for row in rows}) == 1


def test_both_ways_of_scoring_find_the_same_and_are_timed(tmp_path: Path) -> None:
    sizes = "--context", "16", "--continuations", "1", "8", "--windows", "4", "--rounds", "2"
    rows = local_rows("scoring", "150m", *sizes, cwd=tmp_path)
    assert [row["continuation"] for row in rows] == ["1", "8"]
    assert all(float(row["scored_s"]) > 0 < float(row["everywhere_s"]) for row in rows)
