"""Perplexity of a checkpoint, compared with that of its export by the lm-evaluation-harness."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from exported import checkpoint_with_tokenizer, export
from lm_eval.api.instance import Instance
from torch import nn

from tokengrow.data.corpus import TextCorpus
from tokengrow.data.tokenizer import Tokenizer
from tokengrow.evaluation.perplexity import measure_perplexity
from tokengrow.evaluation.scoring import Scorer


def test_perplexity_equals_that_of_the_exported_model(
    hub: ModuleType,
    load: Callable[..., nn.Module],
    tokenizer: Tokenizer,
    corpus: TextCorpus,
    tmp_path: Path,
) -> None:
    from lm_eval.models.huggingface import HFLM  # imports transformers

    source = checkpoint_with_tokenizer(tokenizer)
    folder = export(tmp_path / "hf", source)
    texts = [
        text[:size]
        for text, size in zip(corpus.documents("validation"), (2000, 30, 700), strict=True)
    ]
    harness = HFLM(
        load(folder, dtype=torch.float64),
        tokenizer=hub.AutoTokenizer.from_pretrained(folder),
        batch_size=3,
        max_length=source.config.context_length,
    )
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    log_likelihoods = harness.loglikelihood_rolling(requests, disable_tqdm=True)
    for text, log_likelihood in zip(texts, log_likelihoods, strict=True):
        perplexity = measure_perplexity([text], tokenizer, Scorer(source.model.double()))
        assert perplexity.nats == pytest.approx(-log_likelihood, rel=1e-11)
