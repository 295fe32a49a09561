"""The command itself, killed with SIGKILL in the middle of a stage and right after a growth."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokengrow.checkpoint.layout import OPTIMIZER, WEIGHTS, find_checkpoints, step_folder
from tokengrow.cli.resolve import resolve_train
from tokengrow.data.store import TokenStore
from tokengrow.training.fit import fit

RECIPE = """\
# @package _global_
name: climb
batch_size: 4
micro_batch_size: 2
validation_every: 10
validation_sequences: 8
checkpoint_every: 5
log_every: 1
optim: {lr: 3e-3, min_lr: 3e-4, warmup_steps: 5}
model:
  vocab_size: 512
  context_length: 32
  layers: 2
  width: 32
  heads: 2
  tokens: {query: 8, key: 8, value: 8, output: 8, ffn: 16}
stages:
  small: {steps: 40}
  large: {steps: 10, model: {tokens: {query: 16, value: 16, ffn: 32}}}
"""


def run_until(arguments: list[str], cwd: Path, line_with: str | None) -> list[str]:
    """Runs the command, killing it at the first line that holds these words; its lines till
    then."""
    lines: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-m", "tokengrow", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if line_with is not None and line_with in line:
                process.kill()  # SIGKILL
                break
    assert process.returncode == (0 if line_with is None else -9), lines
    return lines


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_killed_twice_the_same_command_ends_with_the_same_bits(
    store: TokenStore,
    composed: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    recipe = tmp_path / "mine" / "recipes" / "climb.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text(RECIPE)
    changes = [f"hydra.searchpath=[file://{recipe.parents[1]}]", "recipes=climb"]
    changes += [f"store={store.folder}", "fabric=cpu", f"out={tmp_path / 'whole'}"]
    whole = fit(resolve_train(composed("train", *changes)).run, store).checkpoint.folder
    assert whole is not None

    out = tmp_path / "killed"
    command = ["train", "--config-dir", str(recipe.parents[1]), "recipes=climb"]
    command += [f"store={store.folder}", "fabric=cpu", f"out={out}"]

    run_until(command, tmp_path, line_with="step 13/40")
    (saved,) = [folder.name for folder in find_checkpoints(out)][-1:]
    assert step_folder(10) <= saved < step_folder(40), "killed in the middle of the first stage"

    lines = run_until(command, tmp_path, line_with="grown ")
    assert not any("step 1/40" in line for line in lines), "it went on, it did not begin again"
    assert find_checkpoints(out)[-1].name == step_folder(40), "killed right after the growth"

    run_until(command, tmp_path, line_with=None)
    for name in (WEIGHTS, OPTIMIZER):
        assert (out / step_folder(50) / name).read_bytes() == (whole / name).read_bytes(), name
