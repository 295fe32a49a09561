"""Two hosts with a network between them, and a disk that one of them does not see."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run

from tokengrow.checkpoint.store import load_checkpoint
from tokengrow.data.store import TokenStore
from tokengrow.training.recipe import resolve_train
from tokengrow.training.trainer import fit

SCRIPT = str(Path(__file__).parent / "two_nodes.sh")
ROOT = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
# With a namespace of processes too, so that none of them outlives the test.
HOSTS = ["unshare", *ROOT, "--net", "--mount", "--pid", "--kill-child", "--mount-proc"]


def why_not() -> str | None:
    """Why this machine cannot hold two hosts; None: it can."""
    for program in ("unshare", "ip"):
        if shutil.which(program) is None:
            return f"there is no {program}"
    tried = subprocess.run([*HOSTS, "bash", SCRIPT], capture_output=True, text=True)
    return f"no namespaces: {tried.stderr.strip()}" if tried.returncode else None


@pytest.mark.dist
def test_two_nodes_grow_a_model_as_one_process_does_and_one_node_alone_writes(
    arguments: Callable[..., list[str]],
    composed: Callable[..., dict[str, Any]],
    store: TokenStore,
    tmp_path: Path,
) -> None:
    if reason := why_not():
        pytest.skip(reason)
    disk, other = tmp_path / "disk", tmp_path / "other"
    disk.mkdir()
    other.mkdir()
    words = arguments(f"out={disk / 'run'}", "fabric=fsdp2", "fabric.num_nodes=2")
    command = [*HOSTS, "bash", SCRIPT, str(disk), str(other), sys.executable, "-m", "tokengrow"]
    ended = run([*command, *words], tmp_path)
    assert ended.status == 0, ended.said
    assert ended.said.count("grown ") == 1, "rank 0 alone speaks"
    assert not any(other.iterdir()), "rank 1 writes nothing"

    changes = [f"hydra.searchpath=[file://{tmp_path / 'mine'}]", "recipes=climb", "fabric=cpu"]
    changes += [f"store={store.folder}", f"out={tmp_path / 'alone'}"]
    alone = fit(resolve_train(composed("train", *changes)), store).checkpoint
    together = load_checkpoint(disk / "run")
    assert together.lineage[-1]["steps"] == alone.lineage[-1]["steps"]
    for name, tensor in alone.weights.items():
        torch.testing.assert_close(together.weights[name], tensor, rtol=0, atol=1e-6, msg=name)
