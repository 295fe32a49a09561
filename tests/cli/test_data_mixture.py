"""`data=mixture`: planned, tokenised, trained on, gone on with, and refused where it is wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokengrow.checkpoint.store import load_checkpoint
from tokengrow.data.corpus import TextCorpus

Command = Callable[..., Any]

SMALL = [
    "model=tiny",
    "model.vocab_size=300",
    "model.width=32",
    "model.heads=2",
    "model.layers=1",
    "model.context_length=16",
    "+stages.only.steps=1",
    "batch_size=8",
    "micro_batch_size=8",
    "validation_sequences=8",
    "logger=none",
    "fabric=cpu",
]
"""One update of a model that a vocabulary of 300 fits."""


@pytest.fixture
def mixed(corpus: TextCorpus) -> Callable[..., list[str]]:
    """`mixed(trees=3)`: one module, and all of the corpus with the other weight."""

    def arguments(trees: float = 3) -> list[str]:
        held_out = f"validation_files: {corpus.validation_files}"
        alone = f"source: text, files: ['{corpus.files[0]}/ast.txt'], {held_out}"
        both = f"source: text, files: {corpus.files}, {held_out}"
        sources = f"{{trees: {{{alone}, weight: {trees}}}, all: {{{both}, weight: 1}}}}"
        return ["data=mixture", f"data.sources={sources}"]

    return arguments


def test_a_run_trains_on_a_mixture_and_goes_on(
    command: Command, mixed: Callable[..., list[str]], tmp_path: Path
) -> None:
    run = ["train", *SMALL, *mixed(), f"out={tmp_path / 'run'}"]
    outcome = command(*run)
    assert outcome.status == 0, outcome.err
    assert "data: trees: 75.00% of the sequences, from " in outcome.out
    seen = load_checkpoint(tmp_path / "run", tensors=False)
    assert command(*run, "+stages.more.steps=1").status == 0

    more = ["recipes=continue", f"source={tmp_path / 'run'}", f"out={tmp_path / 'more'}"]
    assert command("train", *more, "stages.continued.steps=1", "fabric=cpu").status == 0
    gone = load_checkpoint(tmp_path / "more", tensors=False)
    assert gone.train_state.fingerprint == seen.train_state.fingerprint
    assert gone.train_state.next_batch == seen.train_state.next_batch + 2
    assert gone.run.tokens_from.data["sources"]["trees"]["weight"] == 3


def test_a_run_that_has_begun_refuses_other_weights(
    command: Command, mixed: Callable[..., list[str]], tmp_path: Path
) -> None:
    run = ["train", *SMALL, f"out={tmp_path / 'run'}"]
    assert command(*run, *mixed()).status == 0
    other = command(*run, *mixed(trees=2), "+stages.more.steps=1")
    assert other.status == 2 and "holds a run" in other.err and "on other data" in other.err


def test_tokenised_before_it_is_trained_on(
    command: Command, mixed: Callable[..., list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "stores"
    made = command("data", *mixed(), "tokenizer.vocab_size=300", f"out={out}")
    assert made.status == 0, made.err
    assert made.out.splitlines()[-1] == f"train with  store={out}"
    assert sorted(path.name for path in out.iterdir()) == ["all", "mixture.json", "trees"]
    again = command("data", *mixed(), "tokenizer.vocab_size=300", f"out={out}")
    assert again.out == made.out

    assert command("train", *SMALL, f"store={out}", f"out={tmp_path / 'a'}").status == 0
    assert command("train", *SMALL, *mixed(), f"out={tmp_path / 'b'}").status == 0
    stored, cached = (load_checkpoint(tmp_path / run, tensors=False) for run in "ab")
    assert stored.train_state.fingerprint == cached.train_state.fingerprint
    probed = ["grow", f"source={tmp_path / 'a'}", "model.tokens.ffn=2048", f"store={out}"]
    assert command(*probed, f"out={tmp_path / 'grown'}").status == 0


def test_a_plan_needs_no_sources(command: Command) -> None:
    assert command("plan", *SMALL, "data=mixture").status == 0


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (
            "{}",
            "data.sources must have at least one source, got none. Name a source and its weight.",
        ),
        ("[books]", "data.sources must be a mapping, got ['books']."),
        (
            "{books: 3}",
            "data.sources.books must have the key source or store, got 3. Write {source: NAME, "
            "..., weight: 1} with the keys of data=NAME, or {store: DIR, weight: 1}.",
        ),
        (
            "{books: {weight: 3}}",
            "data.sources.books must have the key source or store, got {'weight': 3}. Write "
            "{source: NAME, ..., weight: 1} with the keys of data=NAME, or {store: DIR, "
            "weight: 1}.",
        ),
        (
            "{books: {source: txt}}",
            "data.sources.books.source must be one of stdlib, text, hub, got 'txt'.",
        ),
        (
            "{books: {source: mixture}}",
            "data.sources.books.source must be one of stdlib, text, hub, got 'mixture'.",
        ),
        (
            "{books: {source: text, file: [a.txt]}}",
            "Unknown key data.sources.books.file. Did you mean 'files'?",
        ),
        (
            "{books: {store: a, source: text}}",
            "Unknown key data.sources.books.source. Did you mean 'store'?",
        ),
        (
            "{books: {source: text, files: [a.txt], weight: much}}",
            "data.sources.books.weight must be a number, got 'much'.",
        ),
        (
            "{books: {source: text, files: [absent.txt]}}",
            "data.sources.books: data.files must name text files, got 'absent.txt'",
        ),
        ("{books: {store: absent}}", "data.sources.books: Not a token store: absent/store.json"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(
    command: Command, sources: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for verb, arguments in (("data", []), ("train", SMALL)):
        outcome = command(verb, *arguments, "data=mixture", f"data.sources={sources}", "out=out")
        assert outcome.status == 2
        assert outcome.err.startswith(f"tokengrow {verb}: {message}"), outcome.err
        assert not list(tmp_path.iterdir())


def test_a_mixture_has_no_token_files(
    command: Command, mixed: Callable[..., list[str]], tmp_path: Path
) -> None:
    outcome = command("data", *mixed(), "to=megatron", f"out={tmp_path / 'files'}")
    assert outcome.status == 2
    assert outcome.err == (
        "tokengrow data: to must be store for a mixture, got megatron. Convert each source by "
        "itself.\n"
    )
    assert not (tmp_path / "files").exists()
