"""Perplexity after a kill: windows that were scored are known."""

from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from tokengrow.checkpoint.store import load_checkpoint
from tokengrow.data.corpus import TextCorpus
from tokengrow.data.store import TokenStore
from tokengrow.evaluation import perplexity
from tokengrow.evaluation.perplexity import Perplexity, measure_perplexity
from tokengrow.evaluation.response_cache import ResponseCache
from tokengrow.evaluation.scoring import Scorer, Window, WindowScore


class Interrupted(Scorer):
    """Counts the windows that it is asked for, and is killed after some of them."""

    def __init__(self, source: Path, windows: int = 1000) -> None:
        super().__init__(load_checkpoint(source).model.double(), batch_size=1)
        self.left, self.asked = windows, 0

    def score(self, windows: Sequence[Window], done: Any = None) -> list[WindowScore]:
        self.asked += len(windows)
        found = super().score(windows[: self.left], done)
        if len(found) < len(windows):
            raise KeyboardInterrupt
        return found


@pytest.fixture
def texts(corpus: TextCorpus) -> list[str]:
    """Two documents of several windows."""
    first, second, _ = corpus.documents("validation")
    return [first[:600], second[:300]]


@pytest.fixture
def measure(store: TokenStore, texts: list[str], tmp_path: Path) -> Any:
    """`measure(scorer, ...)`: the perplexity of the texts, its windows kept in a folder."""

    def measured(scorer: Scorer, stride: int | None = None, **options: Any) -> Perplexity:
        with ResponseCache(tmp_path) as responses:
            return measure_perplexity(
                texts, store.tokenizer(), scorer, stride, responses=responses, **options
            )

    return measured


def test_what_was_scored_is_not_asked_again(
    measure: Any, source: Path, store: TokenStore, texts: list[str]
) -> None:
    counted = Interrupted(source)
    whole = measure_perplexity(texts, store.tokenizer(), counted)
    with pytest.raises(KeyboardInterrupt):
        measure(Interrupted(source, windows=3))
    again = Interrupted(source)
    found = measure(again)
    assert again.asked == counted.asked - 3 > 0
    assert found.nats == pytest.approx(whole.nats, rel=1e-12)
    assert found.tokens == whole.tokens


def test_windows_of_another_stride_are_others(measure: Any, source: Path, texts: list[str]) -> None:
    asked = []
    for stride in (None, 8, 8):
        scorer = Interrupted(source)
        measure(scorer, stride)
        asked.append(scorer.asked)
    disjoint, sliding, again = asked
    assert sliding > disjoint - len(texts), "the first window of each text is the same one"
    assert again == 0


def test_the_speed_is_that_of_what_is_scored_now(
    measure: Any, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        measure(Interrupted(source, windows=3))
    seconds = iter([0.0])
    clock = SimpleNamespace(monotonic=lambda: next(seconds, 1.0))  # it takes a second
    monkeypatch.setattr(perplexity, "time", clock)
    shown = StringIO()
    found = measure(Interrupted(source), console=Console(file=shown, width=200))
    last = shown.getvalue().splitlines()[-1]
    known = 3 * found.context_length
    assert last.endswith(
        f"{found.tokens:,} tokens, {known} of them known from before, "
        f"{found.tokens - known:,} tokens/s"
    )


def test_where_all_is_known_no_speed_is_told(measure: Any, source: Path) -> None:
    measure(Interrupted(source))
    shown = StringIO()
    measure(Interrupted(source, windows=0), console=Console(file=shown, width=200))
    assert shown.getvalue().endswith(" of them known from before\n")
