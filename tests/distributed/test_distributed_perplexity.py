"""Perplexity in two processes, each of which scores half of the windows."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from launchers import TORCHRUN, run

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
    """Texts with an odd number of windows."""
    first, second, _ = corpus.documents("validation")
    return [first[:2000], "a", second[:300]]


def measure_on_two_ranks(source: Path, texts: list[str], folder: Path) -> list[Perplexity]:
    """Return the result of each of two ranks, which cache windows in `folder / "cache"`."""
    command = [*TORCHRUN, "--nproc-per-node=2", str(WORKER), str(source), str(folder / "cache")]
    result = run([*command, *texts], folder)
    assert result.returncode == 0, result.output[-5000:]
    results = (json.loads((folder / f"rank_{rank}.json").read_text()) for rank in (0, 1))
    return [Perplexity.from_dict(values) for values in results]


def test_both_ranks_return_the_result_of_one_process(
    source: Path, store: TokenStore, texts: list[str], tmp_path: Path
) -> None:
    scorer = Scorer(load_checkpoint(source).model.double())
    expected = measure_perplexity(texts, store.tokenizer(), scorer, stride=9)
    for perplexity in measure_on_two_ranks(source, texts, tmp_path):
        assert replace(perplexity, nats=expected.nats) == expected
        assert perplexity.nats == pytest.approx(expected.nats, rel=1e-12)


def test_two_processes_reuse_the_cache_of_one(
    source: Path, store: TokenStore, texts: list[str], tmp_path: Path
) -> None:
    scorer, cache = Scorer(load_checkpoint(source).model.double()), tmp_path / "cache"
    with ResponseCache(cache) as responses:
        measure_perplexity(texts[:2], store.tokenizer(), scorer, stride=9, responses=responses)
    (first_file,) = cache.iterdir()
    (_, perplexity) = measure_on_two_ranks(source, texts, tmp_path)
    new_files = [path for path in cache.iterdir() if path != first_file]
    scored = [line for path in new_files for line in path.read_text().splitlines()]
    rest = measure_perplexity(texts[2:], store.tokenizer(), scorer, stride=9)
    windows = rolling_windows([0] * (rest.tokens + 1), rest.context_length, 9)
    assert len(scored) == len([*windows])
    expected = measure_perplexity(texts, store.tokenizer(), scorer, stride=9)
    assert perplexity.nats == pytest.approx(expected.nats, rel=1e-12)
