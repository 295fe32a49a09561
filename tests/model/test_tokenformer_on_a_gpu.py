"""Tests of the published figures on a GPU, in float32 without TF32."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokengrow.generation.sampling import SamplingConfig, generate
from tokengrow.model.tokenformer import KVCache, TokenFormer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

Figures = dict[str, Tensor]


@pytest.fixture
def model(published_model: TokenFormer) -> Iterator[TokenFormer]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield published_model.to("cuda")
    torch.backends.cuda.matmul.allow_tf32 = before


def test_logits_and_gradients(model: TokenFormer, published_figures: Figures) -> None:
    logits = model(published_figures["input_ids"].cuda())
    assert (logits.cpu() - published_figures["logits"]).abs().max() <= 5e-6
    F.cross_entropy(logits.flatten(0, 1), published_figures["labels"].flatten().cuda()).backward()
    for name, parameter in model.named_parameters():
        reference = published_figures[f"grad.{name}"]
        assert parameter.grad is not None
        assert (parameter.grad.cpu() - reference).norm() <= 2e-5 * reference.norm(), name


@torch.no_grad()
def test_chunks_after_a_prefix(model: TokenFormer, published_decoding: Figures) -> None:
    cache = KVCache(model.config, 2, 32, device="cuda")
    chunks = published_decoding["input_ids"].cuda().split([8, 4, 20], dim=1)
    logits = torch.cat([model(chunk, cache) for chunk in chunks], dim=1)
    assert (logits.cpu() - published_decoding["full_forward_logits"]).abs().max() <= 5e-6


def test_greedy_tokens(model: TokenFormer, published_decoding: Figures) -> None:
    tokens = published_decoding["greedy.tokens"]
    config = SamplingConfig(max_tokens=16, temperature=0)
    actual = torch.stack(list(generate(model, tokens[:, :8].cuda(), config)), dim=1)
    assert torch.equal(actual.cpu(), tokens[:, 8:])
