"""Scores that the TokenFormer paper reports, for comparison with a model's own scores.

They come from TokenFormer, arXiv 2410.23168, Table 1: zero-shot, perplexity for LAMBADA, accuracy
in per cent for the other tasks. The models were evaluated "on standard zero-shot benchmark
described by mamba" (README of github.com/Haiyang-W/TokenFormer). Mamba's paper (arXiv 2312.00752,
appendix E.2) reports length-normalised accuracy for HellaSwag and ARC-challenge, so the metric of
these two tasks is `acc_norm`.
"""

import math
from dataclasses import dataclass

from tokengrow.model.config import ModelConfig

CITATION = "arXiv 2410.23168, Table 1"

METRICS = (
    ("lambada_openai", "perplexity"),
    ("lambada_openai", "acc"),
    ("hellaswag", "acc_norm"),
    ("piqa", "acc"),
    ("arc_easy", "acc"),
    ("arc_challenge", "acc_norm"),
    ("winogrande", "acc"),
)
"""Task and metric of each column of the published table."""

PUBLISHED_SCORES = {
    "150m": ("TokenFormer-150M", (16.38, 45.0, 35.5, 64.9, 47.3, 24.9, 50.4)),
    "450m": ("TokenFormer-450M", (7.69, 57.3, 47.5, 69.5, 56.2, 26.7, 54.6)),
    "900m": ("TokenFormer-900M", (5.46, 64.0, 55.3, 72.4, 59.9, 30.6, 56.4)),
    "1.5b": ("TokenFormer-1.5B", (5.24, 64.7, 60.0, 74.8, 64.8, 32.0, 59.7)),
}
"""Preset to the name of the model and its scores, in the order of `METRICS`."""


@dataclass(frozen=True)
class PublishedModel:
    """Scores of one published model."""

    name: str
    """Name of the model in the paper."""
    scores: dict[tuple[str, str], float]
    """(task, metric) to perplexity, or accuracy in per cent."""


def nearest_published_model(parameters: int) -> PublishedModel:
    """Return the published model whose parameter count is closest in ratio to `parameters`."""

    def log_ratio(preset: str) -> float:
        return abs(math.log(ModelConfig.preset(preset).num_parameters() / parameters))

    name, scores = PUBLISHED_SCORES[min(PUBLISHED_SCORES, key=log_ratio)]
    return PublishedModel(name, dict(zip(METRICS, scores, strict=True)))
