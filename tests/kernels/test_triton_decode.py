"""A token through blocks by the Triton kernels, against the decoder's plain step in float64.

On a GPU, or in Triton's interpreter: see tests/conftest.py.
"""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from tokengrow.generation import decoder as decode
from tokengrow.generation.decoder import Decoder, block_step, takes_kernels
from tokengrow.kernels import triton_step
from tokengrow.kernels.reference import ACTIVATIONS
from tokengrow.kernels.triton_rows import interpreted
from tokengrow.kernels.triton_step import MAX_BATCH, Step, scores_tile
from tokengrow.model.config import ModelConfig, Taus, Tokens
from tokengrow.model.tokenformer import TokenFormer

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and not interpreted(), reason="needs a GPU or the interpreter"
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CAPACITY = 150


@pytest.fixture
def small_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles to a program, and several pieces of a short cache."""
    monkeypatch.setattr(triton_step, "SCORES_TILE", 1024)
    monkeypatch.setattr(triton_step, "SCORES_PROGRAMS", 7)
    monkeypatch.setattr(triton_step, "VALUES_TILE", 512)
    cuts = {"qkv": (32, 2), "output": (16, 3), "ffn": (16, 3)}
    monkeypatch.setattr(triton_step, "VALUES_CUTS", cuts)
    monkeypatch.setattr(triton_step, "PIECES", 3)
    monkeypatch.setattr(triton_step, "SLOTS", 16)


def model(dtype: torch.dtype = torch.float32, **changes: Any) -> TokenFormer:
    """Of two blocks and odd sizes; each of its layers moves the stream by about its own norm."""
    sizes: dict[str, Any] = {
        "vocab_size": 50,
        "context_length": 16,
        "layers": 2,
        "width": 48,
        "heads": 3,
        "head_dim": 16,
        "rotary_channels": 4,
        "tokens": Tokens(query=37, key=21, value=53, output=40, ffn=90),
        "tau": Taus(query=3.0, key=2.5, ffn=6.0),
        "init": "published",
    }
    built = TokenFormer(ModelConfig(**{**sizes, **changes})).eval()
    built.init_weights(torch.Generator().manual_seed(0))
    return built.to(DEVICE, dtype)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def poisoned(kernels: Step) -> Step:
    """With NaN wherever nothing is written yet."""
    for tensors in vars(kernels).values():
        for tensor in tensors if isinstance(tensors, tuple) else (tensors,):
            if isinstance(tensor, Tensor):
                tensor.fill_(torch.nan)
    return kernels


def exact(run: TokenFormer) -> TokenFormer:
    """The same weights, in float64 and the plain formula."""
    copy = deepcopy(run).double()
    copy.set_kernel("naive")
    return copy


def difference(found: Tensor, wanted: Tensor) -> float:
    assert wanted.dtype == torch.float64
    return ((found - wanted).norm() / wanted.norm()).item()


@torch.no_grad()
def largest_error(
    run: TokenFormer, slot: int, batch: int, starts: list[int] | None = None
) -> float:
    """Of the stream behind the last block and of the token's own keys and values, from those in
    float64; of a norm. Slots from the token's on hold NaN before."""
    config, dtype = run.config, run.embedding.weight.dtype
    shape = (config.layers, batch, config.heads, CAPACITY, config.head_dim)
    own_keys, own_values = (random(*shape, seed=seed, dtype=dtype) for seed in (1, 2))
    keys, values = own_keys.double(), own_values.double()
    for cache in (own_keys, own_values):
        cache[:, :, :, slot:] = torch.nan
    decoder = Decoder(run, batch, CAPACITY)
    decoder.cache.keys, decoder.cache.values = own_keys, own_values
    decoder._slot.fill_(slot)
    decoder.cache.start = None if starts is None else torch.tensor(starts, device=DEVICE)
    place = decoder._place()
    x = random(batch, config.width, seed=3, dtype=dtype)
    wanted = x.double()
    for block, *cache in zip(exact(run).blocks, keys, values, strict=True):
        wanted = block_step(block, wanted, *cache, place)

    kernels = poisoned(decode._build_step(run, batch))
    found = decoder._through(kernels, x.clone())
    assert (found - x).norm() > 0.3 * x.norm()
    differences = [difference(found, wanted)]
    for own, theirs in ((own_keys, keys), (own_values, values)):
        assert own[:, :, :, slot + 1 :].isnan().all()
        differences.append(difference(own[:, :, :, slot], theirs[:, :, :, slot]))
    return max(differences)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("slot", "batch"), [(0, 2), (1, 1), (70, 2), (149, 1)])
def test_equals_the_plain_step(activation: str, slot: int, batch: int, small_cuts: None) -> None:
    assert largest_error(model(activation=activation), slot, batch) <= 2e-6


@pytest.mark.parametrize(("slot", "starts"), [(70, [0, 31]), (149, [149, 20]), (3, [3, 2])])
def test_behind_padding_too(slot: int, starts: list[int], small_cuts: None) -> None:
    # Pieces of 32 slots, or of 64 up to 149: some hold padding alone.
    assert largest_error(model(), slot, 2, starts) <= 2e-6


@pytest.mark.parametrize(
    "sizes",
    [
        {"rotary_channels": 0},
        {"rotary_channels": 16},
        {"head_dim": 5, "rotary_channels": 2},
        {"head_dim": 12, "width": 33, "heads": 5},
        # Under a larger tau a layer's one weight, where its score is negative, is the difference of
        # two numbers near 1: a unit of rounding in erf is 5e-6 of it.
        {"tokens": Tokens(query=1, key=1, value=2, output=3, ffn=1), "tau": Taus()},
    ],
    ids=["not_rotated", "all_rotated", "odd_heads", "odd_width", "few_tokens"],
)
def test_for_all_sizes(sizes: dict[str, Any], small_cuts: None) -> None:
    assert largest_error(model(**sizes), 40, 1) <= 2e-6


def test_as_the_work_is_really_cut() -> None:
    assert largest_error(model(), 100, 1) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(dtype: torch.dtype, small_cuts: None) -> None:
    assert largest_error(model(dtype), 40, 1) <= 2 * torch.finfo(dtype).eps


@torch.no_grad()
def test_layers_that_make_nothing_leave_the_stream_as_it_is(small_cuts: None) -> None:
    run = model()
    for weight in run.blocks.parameters():
        weight.zero_()
    decoder, x = Decoder(run, 1, 4), random(1, 48, seed=3)
    assert torch.equal(decoder._through(decode._build_step(run, 1), x), x)


def test_a_decoder_that_takes_them_equals_the_full_forward(
    small_cuts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "takes_kernels", lambda *_: True)
    run = model()
    ids = torch.randint(50, (1, 6), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    decoder = Decoder(run, 1, 6)
    assert decoder._kernels is not None
    poisoned(decoder._kernels)
    decoder.prefill(ids[:, :3])
    logits = [decoder.step(token).clone() for token in ids[:, 3:].unbind(1)]
    with torch.no_grad():
        wanted = exact(run)(ids)[:, 3:]
    assert difference(torch.stack(logits, dim=1), wanted) <= 2e-6


def test_what_the_kernels_take() -> None:
    run = model()
    assert takes_kernels(run, 1) is (DEVICE.type == "cuda")
    assert decode._suits_kernels(run, MAX_BATCH)
    assert not decode._suits_kernels(run, MAX_BATCH + 1)
    assert not decode._suits_kernels(model(width=10000, heads=1), 1)
    run.set_kernel("naive")
    assert not decode._suits_kernels(run, 1)


@pytest.mark.parametrize(("n", "width", "layers"), [(1536, 1536, 3), (6144, 1536, 1), (7, 48, 3)])
def test_all_programs_for_scores_have_work(n: int, width: int, layers: int) -> None:
    rows, block, programs = scores_tile(n, width, layers, 2)
    assert block >= width and programs * layers <= triton_step.SCORES_PROGRAMS
    assert rows * (programs - 1) < n


def test_a_step_is_not_made_for_more_rows() -> None:
    with pytest.raises(AssertionError):
        Step(MAX_BATCH + 1, 8, 1, 8, 8, "softmax", DEVICE)
