"""Perplexity by two processes, of which each scores half of the windows."""

import json
from pathlib import Path

import pytest
from ranks import TORCHRUN, run

from tokengrow.checkpoint.store import load_checkpoint
from tokengrow.data.corpus import TextCorpus
from tokengrow.data.store import TokenStore
from tokengrow.evaluation.perplexity import measure_perplexity
from tokengrow.evaluation.scoring import Scorer

WORKER = Path(__file__).parent / "perplexity_worker.py"


def test_two_processes_both_find_what_one_finds(
    source: Path, store: TokenStore, corpus: TextCorpus, tmp_path: Path
) -> None:
    first, second, _ = corpus.documents("validation")
    texts = [first[:2000], "a", second[:300]]  # an odd number of windows
    command = [*TORCHRUN, "--nproc-per-node=2", str(WORKER), str(source), *texts]
    ended = run(command, tmp_path)
    assert ended.status == 0, ended.said[-5000:]
    scorer = Scorer(load_checkpoint(source).model.double())
    alone = measure_perplexity(texts, store.tokenizer(), scorer, stride=9).to_dict()
    for rank in (0, 1):
        together = json.loads((tmp_path / f"rank_{rank}.json").read_text())
        assert together == pytest.approx(alone, rel=1e-12)
