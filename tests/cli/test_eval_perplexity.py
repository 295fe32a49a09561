"""`tokengrow eval tasks=[perplexity]`: a figure of a text, and what is refused."""

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tokengrow.checkpoint.store import load_checkpoint
from tokengrow.data.corpus import TextCorpus
from tokengrow.data.store import TokenStore
from tokengrow.evaluation.perplexity import Perplexity, measure_perplexity, perplexity_caption
from tokengrow.evaluation.scoring import Scorer

Call = Callable[..., Any]
KilledAfter = Callable[[int], AbstractContextManager[None]]


@pytest.fixture
def measured(command: Call, source: Path, tmp_path: Path) -> Call:
    """`measured(*arguments)`: what `eval tasks=[perplexity]` does with the source."""
    own = [f"source={source}", f"out={tmp_path / 'eval'}", "tasks=[perplexity]", "fabric=cpu"]
    return lambda *arguments: command("eval", *own, *arguments)


@pytest.fixture
def book(corpus: TextCorpus, tmp_path: Path) -> Path:
    """A file of one document."""
    path = tmp_path / "book.txt"
    path.write_text(next(corpus.documents("train"))[:3000])
    return path


def found_in(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def figures_of(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key != "text_sha256"}


def test_the_held_out_text_of_the_run_is_measured(
    measured: Call, source: Path, store: TokenStore, corpus: TextCorpus, tmp_path: Path
) -> None:
    outcome = measured("limit=2", "perplexity.stride=16")
    assert outcome.status == 0, outcome.err
    texts = [*corpus.documents("validation")][:2]
    scorer = Scorer(load_checkpoint(source).model.float())
    expected = measure_perplexity(texts, store.tokenizer(), scorer, 16)
    found = found_in(tmp_path / "eval")["perplexity"]
    assert found["text_sha256"] == expected.text_sha256
    assert figures_of(found) == pytest.approx(figures_of(expected.to_dict()), rel=1e-6)
    assert perplexity_caption(Perplexity.from_dict(found)) in outcome.out
    assert f"{found['bits_per_byte']:.5f}" in outcome.out


def test_any_file_is_measured_as_a_whole(measured: Call, book: Path, tmp_path: Path) -> None:
    outcome = measured("data=text", f"data.files=[{book}]", "perplexity.split=all")
    assert outcome.status == 0, outcome.err
    found = found_in(tmp_path / "eval")["perplexity"]
    assert (found["documents"], found["bytes"]) == (1, len(book.read_bytes()))


def test_results_are_reused_until_the_text_changes(
    measured: Call, book: Path, tmp_path: Path
) -> None:
    arguments = "data=text", f"data.files=[{book}]", "perplexity.split=all"
    first, again = measured(*arguments), measured(*arguments)
    message = "results already exist; skipping evaluation"
    assert message not in first.err
    assert message in again.err
    assert again.out == first.out
    book.write_text("another text\n")
    assert "13 bytes, 3 words" in measured(*arguments).out
    assert len(list((tmp_path / "eval").glob("*.json"))) == 2


def test_a_killed_evaluation_resumes(
    measured: Call, book: Path, tmp_path: Path, batches: list[int], killed_after: KilledAfter
) -> None:
    arguments = "data=text", f"data.files=[{book}]", "perplexity.split=all", "batch_size=1"
    with killed_after(4):
        killed = measured(*arguments)
    assert killed.status == 130
    assert "interrupted; answers so far are kept; the same command resumes" in killed.err
    assert not list((tmp_path / "eval").glob("*.json"))
    batches.clear()
    outcome = measured(*arguments)
    assert outcome.status == 0, outcome.err
    found = Perplexity.from_dict(found_in(tmp_path / "eval")["perplexity"])
    assert len(batches) == -(-found.tokens // found.context_length) - 4


def test_it_needs_no_harness(measured: Call, book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    outcome = measured("data=text", f"data.files=[{book}]", "perplexity.split=all")
    assert outcome.status == 0, outcome.err


def test_an_out_that_is_a_file_is_refused_before_measuring(
    measured: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scorer, "score", None)
    (tmp_path / "eval").write_text("a file of mine")
    outcome = measured("limit=1")
    assert outcome.status == 2
    message = f"out must be a directory, got the file {tmp_path / 'eval'}. Choose another out=."
    assert outcome.err.endswith(f"tokengrow eval: {message}\n")
    assert (tmp_path / "eval").read_text() == "a file of mine"


def test_a_file_without_text_is_named(measured: Call, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    words = "data=text", f"data.files=[{tmp_path}/empty.txt]", "perplexity.split=all"
    outcome = measured(*words)
    assert outcome.status == 2
    assert f"at least one document, got none in {tmp_path}/empty.txt. Check data." in outcome.err


def test_the_text_of_the_sources_run_is_named_in_the_file(
    measured: Call, source: Path, tmp_path: Path
) -> None:
    assert measured("limit=1").status == 0
    [file] = (tmp_path / "eval").glob("*.json")
    written = file.read_text()
    assert written.endswith("}\n")
    recorded = load_checkpoint(source).run.tokens_from.store
    assert json.loads(written)["settings"]["data"] == {"store": recorded}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["perplexity.stride=33"], "perplexity.stride must be at most 32"),
        (["perplexity.strid=3"], "perplexity.strid"),
        (
            ["limit=0.5"],
            "limit must be a whole number of documents for perplexity, got a fraction.",
        ),
        (["data=megatron", "data.prefix=a"], "data=megatron holds token ids"),
        (
            ["data=text", "data.files=[nowhere.txt]"],
            "data.files must name text files, got 'nowhere.txt'",
        ),
        (["data=stdlib", "data.validation_fraction=0"], "perplexity.split=all"),
    ],
)
def test_wrong_input_is_one_sentence_and_writes_nothing(
    measured: Call, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    outcome = measured(*arguments)
    assert outcome.status == 2
    *progress, last = outcome.err.splitlines()
    assert sentence in last
    assert set(progress) <= {"reading the checkpoint and the tasks", "perplexity: reading the text"}
    assert not (tmp_path / "eval").exists()
