"""The benchmarks run, check what they time, and print rows."""

import csv
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_order_of_samples_is_timed_and_checked(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.megatron_order", "20000", "--epochs", "2"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (row,) = csv.DictReader(done.stdout.splitlines())
    assert int(row["samples"]) == (int(row["tokens"]) - 1) // 2048
    assert float(row["seconds"]) > 0
    assert not list(tmp_path.iterdir()), "nothing is left behind"
