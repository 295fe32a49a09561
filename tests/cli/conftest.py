"""A folder to work in, GPT-NeoX YAMLs that become recipes there, the memory of a command, and what
a model is asked."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from published_yaml import OFFICIAL

from tokengrow.evaluation.scoring import Scorer

Command = Callable[..., Any]
Composed = Callable[..., dict[str, Any]]
WriteYaml = Callable[..., Path]


MEASURED = """
import resource, subprocess, sys
subprocess.run([sys.executable, "-m", "tokengrow", *sys.argv[1:]], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
"""In a process between: a child's peak counts what its parent held when it was started."""
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072"}
"""Makes glibc give each freed tensor back to the system. Left to itself it raises this size with
what is freed, and then keeps freed tensors, how many differs from run to run (by up to 8 % of the
weights, measured): the peak would be its habit, not what the command holds."""


@pytest.fixture
def peak_memory() -> Callable[..., int]:
    """`peak_memory(verb, *arguments)`: bytes that a command has resident at its height."""

    def peak(*arguments: str) -> int:
        command = [sys.executable, "-c", MEASURED, *arguments]
        env = os.environ | GIVEN_BACK
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.splitlines()[-1]) * (1 if sys.platform == "darwin" else 1024)

    return peak


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each batch that a model was asked in the test so far."""
    seen: list[int] = []
    score_batch = Scorer._score_batch

    def watched(self: Scorer, batch: Any) -> Any:
        seen.append(len(batch))
        return score_batch(self, batch)

    monkeypatch.setattr(Scorer, "_score_batch", watched)
    return seen


@pytest.fixture
def killed_after(batches: list[int]) -> Callable[[int], AbstractContextManager[None]]:
    """`with killed_after(number)`: Ctrl-C where one batch more than that would be asked."""

    @contextmanager
    def kill(number: int) -> Iterator[None]:
        score_batch = Scorer._score_batch

        def dies(self: Scorer, batch: Any) -> Any:
            if len(batches) == number:
                raise KeyboardInterrupt
            return score_batch(self, batch)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Scorer, "_score_batch", dies)
            yield

    return kill


@pytest.fixture
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty working directory; every path below is relative to it."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def write_yaml(somewhere: None) -> WriteYaml:
    """`write_yaml(name, **changes)`: the config of model A with changes; None removes a key."""

    def write(name: str, **changes: Any) -> Path:
        values = json.loads(OFFICIAL.read_text()) | changes
        Path(name).write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
        return Path(name)

    return write


@pytest.fixture
def convert_yaml(command: Command) -> Callable[..., str]:
    """`convert_yaml(*arguments)`: convert into `mine`, and return the output as one line."""

    def call(*arguments: str) -> str:
        outcome = command("convert", *arguments, "out=mine")
        assert (outcome.status, outcome.err) == (0, "")
        return " ".join(outcome.out.split())

    return call


@pytest.fixture
def compose_converted(composed: Composed) -> Composed:
    """`compose_converted(*overrides)`: values that a recipe in `mine` composes to."""
    return lambda *words: composed(
        "train", f"hydra.searchpath=[file://{Path('mine').resolve()}]", *words
    )
