"""Tests of the decoding kernels: one token, compared with the plain step in float64.

They run on a GPU or in Triton's interpreter: see tests/conftest.py.
"""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from tokengrow.generation import decoder as decoder_module
from tokengrow.generation.decoder import Decoder, block_step, takes_kernels
from tokengrow.kernels import triton_step
from tokengrow.kernels.limits import MAX_DECODE_BATCH
from tokengrow.kernels.reference import ACTIVATIONS
from tokengrow.kernels.triton_rows import is_interpreted
from tokengrow.kernels.triton_step import DecodeStep, scores_tile
from tokengrow.model.config import ModelConfig, ParameterTokens, Taus
from tokengrow.model.tokenformer import TokenFormer

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and not is_interpreted(), reason="needs a GPU or the interpreter"
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CAPACITY = 150


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that give a program several tiles, and a short cache several splits."""
    monkeypatch.setattr(triton_step, "SCORES_TILE", 1024)
    monkeypatch.setattr(triton_step, "SCORES_PROGRAMS", 7)
    monkeypatch.setattr(triton_step, "VALUES_TILE", 512)
    splits = {"qkv": (32, 2), "output": (16, 3), "ffn": (16, 3)}
    monkeypatch.setattr(triton_step, "VALUES_SPLITS", splits)
    monkeypatch.setattr(triton_step, "SPLITS", 3)
    monkeypatch.setattr(triton_step, "SLOTS", 16)


def model(dtype: torch.dtype = torch.float32, **changes: Any) -> TokenFormer:
    """Return a model with two blocks and odd sizes; each layer changes the stream by its norm."""
    sizes: dict[str, Any] = {
        "vocab_size": 50,
        "context_length": 16,
        "layers": 2,
        "width": 48,
        "heads": 3,
        "head_dim": 16,
        "rotary_channels": 4,
        "tokens": ParameterTokens(query=37, key=21, value=53, output=40, ffn=90),
        "tau": Taus(query=3.0, key=2.5, ffn=6.0),
        "init": "published",
    }
    built = TokenFormer(ModelConfig(**{**sizes, **changes})).eval()
    built.init_weights(torch.Generator().manual_seed(0))
    return built.to(DEVICE, dtype)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def poisoned_step(step: DecodeStep) -> DecodeStep:
    """Fill the buffers of a step with NaN."""
    for tensors in vars(step).values():
        for tensor in tensors if isinstance(tensors, tuple) else (tensors,):
            if isinstance(tensor, Tensor):
                tensor.fill_(torch.nan)
    return step


def exact_model(run: TokenFormer) -> TokenFormer:
    """Return a copy of a model in float64 with the reference kernel."""
    copy = deepcopy(run).double()
    copy.set_kernel("reference")
    return copy


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert expected.dtype == torch.float64
    return ((actual - expected).norm() / expected.norm()).item()


@torch.no_grad()
def largest_error(
    run: TokenFormer, slot: int, batch: int, starts: list[int] | None = None
) -> float:
    """Return the largest error, relative to float64, of the stream, keys and values of a token.

    The slots from that of the token on are filled with NaN before.
    """
    config, dtype = run.config, run.embedding.weight.dtype
    shape = (config.layers, batch, config.heads, CAPACITY, config.head_dim)
    cached_keys, cached_values = (random(*shape, seed=seed, dtype=dtype) for seed in (1, 2))
    keys, values = cached_keys.double(), cached_values.double()
    for cache in (cached_keys, cached_values):
        cache[:, :, :, slot:] = torch.nan
    decoder = Decoder(run, batch, CAPACITY)
    decoder.cache.keys, decoder.cache.values = cached_keys, cached_values
    decoder._slot.fill_(slot)
    decoder.cache.start = None if starts is None else torch.tensor(starts, device=DEVICE)
    place = decoder._place()
    x = random(batch, config.width, seed=3, dtype=dtype)
    expected = x.double()
    for block, *cache in zip(exact_model(run).blocks, keys, values, strict=True):
        expected = block_step(block, expected, *cache, place)

    step = poisoned_step(decoder_module._build_step(run, batch))
    actual = decoder._through(step, x.clone())
    assert (actual - x).norm() > 0.3 * x.norm()
    errors = [relative_error(actual, expected)]
    for cache, exact in ((cached_keys, keys), (cached_values, values)):
        assert cache[:, :, :, slot + 1 :].isnan().all()
        errors.append(relative_error(cache[:, :, :, slot], exact[:, :, :, slot]))
    return max(errors)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("slot", "batch"), [(0, 2), (1, 1), (70, 2), (149, 1)])
def test_step_equals_the_plain_step(
    activation: str, slot: int, batch: int, small_tiles: None
) -> None:
    assert largest_error(model(activation=activation), slot, batch) <= 2e-6


@pytest.mark.parametrize(("slot", "starts"), [(70, [0, 31]), (149, [149, 20]), (3, [3, 2])])
def test_step_after_padding(slot: int, starts: list[int], small_tiles: None) -> None:
    # Splits have 32 slots, or 64 up to slot 149; some contain only padding.
    assert largest_error(model(), slot, 2, starts) <= 2e-6


@pytest.mark.parametrize(
    "sizes",
    [
        {"rotary_channels": 0},
        {"rotary_channels": 16},
        {"head_dim": 5, "rotary_channels": 2},
        {"head_dim": 12, "width": 33, "heads": 5},
        # The default taus are small. With a larger tau and a negative score, the only weight of a
        # layer is the difference of two numbers near 1, and rounding in erf is 5e-6 of it.
        {"tokens": ParameterTokens(query=1, key=1, value=2, output=3, ffn=1), "tau": Taus()},
    ],
    ids=["not_rotated", "all_rotated", "odd_heads", "odd_width", "few_tokens"],
)
def test_step_for_all_sizes(sizes: dict[str, Any], small_tiles: None) -> None:
    assert largest_error(model(**sizes), 40, 1) <= 2e-6


def test_step_with_the_default_tiles() -> None:
    assert largest_error(model(), 100, 1) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_step_in_half_precision(dtype: torch.dtype, small_tiles: None) -> None:
    assert largest_error(model(dtype), 40, 1) <= 2 * torch.finfo(dtype).eps


@torch.no_grad()
def test_zero_weights_do_not_change_the_stream(small_tiles: None) -> None:
    run = model()
    for weight in run.blocks.parameters():
        weight.zero_()
    decoder, x = Decoder(run, 1, 4), random(1, 48, seed=3)
    assert torch.equal(decoder._through(decoder_module._build_step(run, 1), x), x)


def test_decoder_with_kernels_equals_the_full_forward(
    small_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_module, "takes_kernels", lambda *_: True)
    run = model()
    ids = torch.randint(50, (1, 6), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    decoder = Decoder(run, 1, 6)
    assert decoder._kernels is not None
    poisoned_step(decoder._kernels)
    decoder.prefill(ids[:, :3])
    logits = [decoder.step(token).clone() for token in ids[:, 3:].unbind(1)]
    with torch.no_grad():
        expected = exact_model(run)(ids)[:, 3:]
    assert relative_error(torch.stack(logits, dim=1), expected) <= 2e-6


def test_supported_models_and_batches() -> None:
    run = model()
    assert takes_kernels(run, 1) is (DEVICE.type == "cuda")
    assert decoder_module._suits_kernels(run, MAX_DECODE_BATCH)
    assert not decoder_module._suits_kernels(run, MAX_DECODE_BATCH + 1)
    assert not decoder_module._suits_kernels(model(width=10000, heads=1), 1)
    run.set_kernel("reference")
    assert not decoder_module._suits_kernels(run, 1)


@pytest.mark.parametrize(("n", "width", "layers"), [(1536, 1536, 3), (6144, 1536, 1), (7, 48, 3)])
def test_every_program_for_scores_has_work(n: int, width: int, layers: int) -> None:
    rows, block, programs = scores_tile(n, width, layers, 2)
    assert block >= width and programs * layers <= triton_step.SCORES_PROGRAMS
    assert rows * (programs - 1) < n


def test_step_refuses_a_larger_batch() -> None:
    with pytest.raises(AssertionError):
        DecodeStep(MAX_DECODE_BATCH + 1, 8, 1, 8, 8, "softmax", DEVICE)
