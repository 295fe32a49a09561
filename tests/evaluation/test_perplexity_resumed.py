"""Perplexity after an interruption: scored windows come from the cache."""

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


class InterruptedScorer(Scorer):
    """Scorer that counts the requested windows, and is interrupted after `max_windows`."""

    def __init__(self, source: Path, max_windows: int = 1000) -> None:
        super().__init__(load_checkpoint(source).model.double(), batch_size=1)
        self.max_windows, self.requested = max_windows, 0

    def score(self, windows: Sequence[Window], on_score: Any = None) -> list[WindowScore]:
        self.requested += len(windows)
        scores = super().score(windows[: self.max_windows], on_score)
        if len(scores) < len(windows):
            raise KeyboardInterrupt
        return scores


@pytest.fixture
def texts(corpus: TextCorpus) -> list[str]:
    """Two documents of several windows."""
    first, second, _ = corpus.documents("validation")
    return [first[:600], second[:300]]


@pytest.fixture
def measure(store: TokenStore, texts: list[str], tmp_path: Path) -> Any:
    """Return a function of a scorer that measures the texts, with a cache of windows."""

    def measure_cached(scorer: Scorer, stride: int | None = None, **options: Any) -> Perplexity:
        with ResponseCache(tmp_path) as responses:
            return measure_perplexity(
                texts, store.tokenizer(), scorer, stride, responses=responses, **options
            )

    return measure_cached


def test_resumed_measurement_skips_scored_windows(
    measure: Any, source: Path, store: TokenStore, texts: list[str]
) -> None:
    uninterrupted = InterruptedScorer(source)
    expected = measure_perplexity(texts, store.tokenizer(), uninterrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(InterruptedScorer(source, max_windows=3))
    resumed = InterruptedScorer(source)
    result = measure(resumed)
    assert resumed.requested == uninterrupted.requested - 3 > 0
    assert result.nats == pytest.approx(expected.nats, rel=1e-12)
    assert result.tokens == expected.tokens


def test_another_stride_has_other_windows(measure: Any, source: Path, texts: list[str]) -> None:
    requested = []
    for stride in (None, 8, 8):
        scorer = InterruptedScorer(source)
        measure(scorer, stride)
        requested.append(scorer.requested)
    disjoint, sliding, repeated = requested
    assert sliding > disjoint - len(texts), "only the first window of each text is the same"
    assert repeated == 0


def test_shown_speed_excludes_cached_windows(
    measure: Any, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        measure(InterruptedScorer(source, max_windows=3))
    seconds = iter([0.0])
    clock = SimpleNamespace(monotonic=lambda: next(seconds, 1.0))  # scoring takes one second
    monkeypatch.setattr(perplexity, "time", clock)
    output = StringIO()
    result = measure(InterruptedScorer(source), console=Console(file=output, width=200))
    last = output.getvalue().splitlines()[-1]
    cached = 3 * result.context_length
    assert last.endswith(
        f"{result.tokens:,} tokens, {cached} of them from the cache, "
        f"{result.tokens - cached:,} tokens/s"
    )


def test_no_speed_is_shown_if_all_is_cached(measure: Any, source: Path) -> None:
    measure(InterruptedScorer(source))
    output = StringIO()
    measure(InterruptedScorer(source, max_windows=0), console=Console(file=output, width=200))
    assert output.getvalue().endswith(" of them from the cache\n")
