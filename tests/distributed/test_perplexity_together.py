"""Perplexity by two processes, of which each scores half of the windows."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from ranks import TORCHRUN, run

from tokengrow.checkpoint.store import load_checkpoint
from tokengrow.data.corpus import TextCorpus
from tokengrow.data.store import TokenStore
from tokengrow.evaluation.perplexity import Perplexity, measure_perplexity
from tokengrow.evaluation.response_cache import ResponseCache
from tokengrow.evaluation.rolling_windows import rolling_windows
from tokengrow.evaluation.scoring import Scorer

WORKER = Path(__file__).parent / "perplexity_worker.py"


@pytest.fixture
def texts(corpus: TextCorpus) -> list[str]:
    """An odd number of windows."""
    first, second, _ = corpus.documents("validation")
    return [first[:2000], "a", second[:300]]


def measured_together(source: Path, texts: list[str], folder: Path) -> list[Perplexity]:
    """What each of two ranks finds, with the windows that are kept in `folder / "kept"`."""
    kept = str(folder / "kept")
    ended = run([*TORCHRUN, "--nproc-per-node=2", str(WORKER), str(source), kept, *texts], folder)
    assert ended.status == 0, ended.said[-5000:]
    written = (json.loads((folder / f"rank_{rank}.json").read_text()) for rank in (0, 1))
    return [Perplexity.from_dict(values) for values in written]


def test_two_processes_both_find_what_one_finds(
    source: Path, store: TokenStore, texts: list[str], tmp_path: Path
) -> None:
    scorer = Scorer(load_checkpoint(source).model.double())
    alone = measure_perplexity(texts, store.tokenizer(), scorer, stride=9)
    for together in measured_together(source, texts, tmp_path):
        assert replace(together, nats=alone.nats) == alone
        assert together.nats == pytest.approx(alone.nats, rel=1e-12)


def test_two_processes_go_on_from_what_one_has_scored(
    source: Path, store: TokenStore, texts: list[str], tmp_path: Path
) -> None:
    scorer, kept = Scorer(load_checkpoint(source).model.double()), tmp_path / "kept"
    with ResponseCache(kept) as responses:
        measure_perplexity(texts[:2], store.tokenizer(), scorer, stride=9, responses=responses)
    (of_one,) = kept.iterdir()
    (_, whole) = measured_together(source, texts, tmp_path)
    new = [path for path in kept.iterdir() if path != of_one]
    lines = [line for path in new for line in path.read_text().splitlines()]
    rest = measure_perplexity(texts[2:], store.tokenizer(), scorer, stride=9)
    assert len(lines) == len([*rolling_windows([0] * (rest.tokens + 1), rest.context_length, 9)])
    alone = measure_perplexity(texts, store.tokenizer(), scorer, stride=9)
    assert whole.nats == pytest.approx(alone.nats, rel=1e-12)
