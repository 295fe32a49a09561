"""A folder to work in, and GPT-NeoX YAMLs that become recipes there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from published_yaml import OFFICIAL

Command = Callable[..., Any]
Composed = Callable[..., dict[str, Any]]
Written = Callable[..., Path]


@pytest.fixture
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder to stand in; every path below is relative to it."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def written(somewhere: None) -> Written:
    """`written(name, **changes)`: the official configuration with these keys changed; None takes
    one out."""

    def write(name: str, **changes: Any) -> Path:
        values = json.loads(OFFICIAL.read_text()) | changes
        Path(name).write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
        return Path(name)

    return write


@pytest.fixture
def convert_yaml(command: Command) -> Callable[..., str]:
    """`convert_yaml(*arguments)`: into the folder `mine`; gives what it said, on one line."""

    def call(*arguments: str) -> str:
        outcome = command("convert", *arguments, "out=mine")
        assert (outcome.status, outcome.err) == (0, "")
        return " ".join(outcome.out.split())

    return call


@pytest.fixture
def from_mine(composed: Composed) -> Composed:
    """`from_mine(*overrides)`: the run that a recipe in the folder `mine` composes to."""
    return lambda *words: composed(
        "train", f"hydra.searchpath=[file://{Path('mine').resolve()}]", *words
    )
