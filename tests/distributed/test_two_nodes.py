"""Two hosts with a network between them, and a disk that only one of them can read."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launchers import run

from tokengrow.checkpoint.store import load_checkpoint
from tokengrow.data.store import TokenStore
from tokengrow.training.recipe import resolve_train
from tokengrow.training.trainer import fit

SCRIPT = str(Path(__file__).parent / "two_nodes.sh")
ROOT = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
# A PID namespace too, so that no process outlives the test.
UNSHARE = ["unshare", *ROOT, "--net", "--mount", "--pid", "--kill-child", "--mount-proc"]


def skip_reason() -> str | None:
    """Return why this machine cannot emulate two hosts; None if it can."""
    for program in ("unshare", "ip"):
        if shutil.which(program) is None:
            return f"needs the program {program}"
    done = subprocess.run([*UNSHARE, "bash", SCRIPT], capture_output=True, text=True)
    return f"needs namespaces: {done.stderr.strip()}" if done.returncode else None


@pytest.mark.dist
def test_two_nodes_train_as_one_process_and_only_one_writes(
    train_arguments: Callable[..., list[str]],
    composed: Callable[..., dict[str, Any]],
    store: TokenStore,
    tmp_path: Path,
) -> None:
    if reason := skip_reason():
        pytest.skip(reason)
    disk, other = tmp_path / "disk", tmp_path / "other"
    disk.mkdir()
    other.mkdir()
    arguments = train_arguments(f"out={disk / 'run'}", "fabric=fsdp2", "fabric.num_nodes=2")
    command = [*UNSHARE, "bash", SCRIPT, str(disk), str(other), sys.executable, "-m", "tokengrow"]
    result = run([*command, *arguments], tmp_path)
    assert result.returncode == 0, result.output
    assert result.output.count("grown ") == 1, "only rank 0 prints"
    assert not any(other.iterdir()), "rank 1 writes nothing"

    overrides = [f"hydra.searchpath=[file://{tmp_path / 'mine'}]", "recipes=climb", "fabric=cpu"]
    overrides += [f"store={store.folder}", f"out={tmp_path / 'single'}"]
    expected = fit(resolve_train(composed("train", *overrides)), store).checkpoint
    actual = load_checkpoint(disk / "run")
    assert actual.lineage[-1].steps == expected.lineage[-1].steps
    for name, tensor in expected.weights.items():
        torch.testing.assert_close(actual.weights[name], tensor, rtol=0, atol=1e-6, msg=name)
