"""The scripts in examples/ run as a reader would run them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tokengrow.data.corpus import TextCorpus
from tokengrow.data.store import TokenStore

ROOT = Path(__file__).parents[2]
MAX_LINES = 40


def run(script: str, *arguments: object) -> str:
    """Run an example and return its output."""
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_train_loop_grows_without_a_jump(corpus: TextCorpus, tmp_path: Path) -> None:
    output = run("train_loop.py", corpus.files[0], tmp_path / "store", 30)
    lines = [line for line in output.splitlines() if line.startswith("step ")]
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines]
    sizes = [line.split(", ")[-1] for line in lines]
    assert len(lines) == 60
    assert sizes[29] != sizes[30], "grown in the middle"
    assert losses[0] > losses[29] + 0.5
    assert losses[30] == pytest.approx(losses[29], abs=0.4), "no jump beyond the noise of a batch"
    assert losses[59] < losses[29]


def test_train_loop_has_at_most_40_lines() -> None:
    lines = (ROOT / "examples" / "train_loop.py").read_text().splitlines()
    assert len(lines) <= MAX_LINES


def test_fit_from_python_trains_a_ladder(store: TokenStore, tmp_path: Path) -> None:
    output = run("fit_from_python.py", store.folder, tmp_path / "run", 3)
    assert "small: " in output and "large: " in output
    assert (tmp_path / "run" / "step_00000006" / "COMPLETE").is_file()
