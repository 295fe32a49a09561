"""`tokengrow data`: a corpus into a token store, once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokengrow.data.corpus import TextCorpus
from tokengrow.data.store import TokenStore

Command = Callable[..., Any]

SMALL = [
    "recipes=quickstart",
    "model.vocab_size=300",
    "model.width=32",
    "model.layers=1",
    "model.context_length=16",
    "max_steps_per_stage=1",
    "validation_sequences=4",
    "fabric=cpu",
]
"""One update a stage of a model that the store's vocabulary fits."""


@pytest.fixture
def arguments(corpus: TextCorpus, tmp_path: Path) -> list[str]:
    """The session's corpus into a store of a vocabulary of 300."""
    return [
        "data=text",
        f"data.files={corpus.files}",
        f"data.validation_files={corpus.validation_files}",
        "tokenizer.vocab_size=300",
        f"out={tmp_path / 'store'}",
    ]


def test_it_makes_a_store_and_says_what_is_in_it(
    command: Command, arguments: list[str], tmp_path: Path
) -> None:
    outcome = command("data", *arguments)
    assert outcome.status == 0
    store = TokenStore.open(tmp_path / "store")
    assert store.vocab_size == 300
    for count in (len(store.split("train")), len(store.split("validation")), 300):
        assert f"{count:,}" in outcome.out
    assert str(tmp_path / "store") in outcome.out


def test_a_second_call_reuses_the_store(
    command: Command, arguments: list[str], tmp_path: Path
) -> None:
    first = command("data", *arguments)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
    second = command("data", *arguments)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()} == stamps
    assert second.out == first.out


def test_an_out_with_tokens_of_another_corpus_is_refused(
    command: Command, arguments: list[str], corpus: TextCorpus
) -> None:
    command("data", *arguments)
    outcome = command("data", *arguments, f"data.files=[{corpus.files[0]}/ast.txt]")
    assert outcome.status == 2
    assert "was made from another corpus" in outcome.err


def test_a_store_trains_a_model(command: Command, arguments: list[str], tmp_path: Path) -> None:
    command("data", *arguments)
    outcome = command(
        "train",
        *SMALL,
        f"store={tmp_path / 'store'}",
        f"out={tmp_path / 'run'}",
    )
    assert outcome.status == 0, outcome.err


def test_training_keeps_its_store_in_the_cache(
    command: Command, arguments: list[str], cache: Path, tmp_path: Path
) -> None:
    for run in ("first", "second"):
        outcome = command(
            "train",
            *SMALL,
            *arguments[:-1],
            f"out={tmp_path / run}",
        )
        assert outcome.status == 0, outcome.err
        stores = {path.name: path.stat().st_mtime_ns for path in (cache / "stores").iterdir()}
        if run == "first":
            first = stores
    assert stores == first
