"""The decoder's graphs on a GPU: of kernels and plain. Its arithmetic: test_decode.py."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tokengrow.generation.decoder import Decoder
from tokengrow.generation.sampling import SamplingConfig, generate
from tokengrow.model.config import ModelConfig, ParameterTokens
from tokengrow.model.tokenformer import TokenFormer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MANNERS = pytest.mark.parametrize("manner", ["kernels", "plain"])


def decoder_of(run: TokenFormer, batch: int, capacity: int, manner: str) -> Decoder:
    decoder = Decoder(run, batch, capacity)
    assert decoder._kernels is not None
    if manner == "plain":
        decoder._kernels = None
    return decoder


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def model(
    seed: int,
    dtype: torch.dtype = torch.float32,
    ffn: int = 384,
    activation: str = "l2_norm_gelu",
) -> TokenFormer:
    """Large enough for kernels to be split; its logits have a spread of about 1."""
    config = ModelConfig(
        vocab_size=1000,
        context_length=64,
        layers=4,
        width=256,
        heads=4,
        tokens=ParameterTokens(query=256, key=256, value=256, output=192, ffn=ffn),
        activation=activation,
        init="published",
    )
    built = TokenFormer(config).eval()
    built.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        built.embedding.weight.mul_(3)
    return built.to("cuda", dtype)


def random_ids(*shape: int) -> Tensor:
    return torch.randint(1000, shape, generator=torch.Generator().manual_seed(1)).cuda()


def stepped(decoder: Decoder, ids: Tensor, prompt: int, start: Tensor | None = None) -> Tensor:
    """Logits of the last token of the prompt and of all tokens behind it, one step each."""
    logits = [decoder.prefill(ids[:, :prompt], start)]
    logits += [decoder.step(token).clone() for token in ids[:, prompt:].unbind(1)]
    return torch.stack(logits, dim=1).float()


@torch.no_grad()
def whole(run: TokenFormer, ids: Tensor, prompt: int) -> Tensor:
    """The same from one forward pass."""
    return run(ids)[:, prompt - 1 :].float()


@MANNERS
def test_the_published_figures(
    published_model: TokenFormer, published_decoding: dict[str, Tensor], manner: str
) -> None:
    decoder = decoder_of(published_model.cuda(), 2, 32, manner)
    found = stepped(decoder, published_decoding["input_ids"].cuda(), 8).cpu()
    assert (found - published_decoding["full_forward_logits"][:, 7:]).abs().max() <= 5e-6


@MANNERS
@pytest.mark.parametrize("batch", [1, 3])
def test_float32(batch: int, manner: str) -> None:
    run, ids = model(0), random_ids(batch, 40)
    found, wanted = stepped(decoder_of(run, batch, 48, manner), ids, 5), whole(run, ids, 5)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@MANNERS
@pytest.mark.parametrize("activation", ["gelu_l2_norm", "softmax"])
def test_other_activations(activation: str, manner: str) -> None:
    run, ids = model(0, activation=activation), random_ids(1, 40)
    found, wanted = stepped(decoder_of(run, 1, 48, manner), ids, 5), whole(run, ids, 5)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@MANNERS
def test_bfloat16(manner: str) -> None:
    ids = random_ids(1, 40)
    found = stepped(decoder_of(model(0, torch.bfloat16), 1, 48, manner), ids, 5)
    wanted = whole(model(0), ids, 5)
    assert (found - wanted).norm() <= 0.05 * wanted.norm()


@MANNERS
def test_many_replays(manner: str) -> None:
    run, ids = model(0), random_ids(1, 700)
    found, wanted = stepped(decoder_of(run, 1, 700, manner), ids, 300), whole(run, ids, 300)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@MANNERS
def test_a_graph_serves_one_text_after_another(manner: str) -> None:
    run, ids = model(0), random_ids(2, 40)
    decoder = decoder_of(run, 2, 40, manner)
    first = stepped(decoder, ids, 30)
    stepped(decoder, ids.flip(1), 2)
    assert torch.equal(stepped(decoder, ids, 30), first)


def each_alone(run: TokenFormer, ids: Tensor, prompt: int, start: Tensor) -> Tensor:
    """Of each text by itself, without what is in front of its start."""
    rows = zip(ids, start.tolist(), strict=True)
    return torch.cat([whole(run, row[None, begin:], prompt - begin) for row, begin in rows])


@MANNERS
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_texts_of_different_lengths(manner: str, dtype: torch.dtype, limit: float) -> None:
    ids, start = random_ids(3, 300), torch.tensor([9, 0, 134]).cuda()
    decoder = decoder_of(model(0, dtype), 3, 300, manner)
    found, wanted = stepped(decoder, ids, 135, start), each_alone(model(0), ids, 135, start)
    assert (found - wanted).norm() <= limit * wanted.norm()


@MANNERS
def test_a_graph_for_texts_with_padding_and_one_for_those_without(manner: str) -> None:
    run, ids = model(0), random_ids(2, 40)
    decoder, none = decoder_of(run, 2, 40, manner), torch.zeros(2, dtype=torch.int64)
    padded = torch.tensor([7, 0])
    for start in (none, padded, padded.flip(0), none):
        given = start.cuda() if start.any() else None
        found, wanted = stepped(decoder, ids, 10, given), each_alone(run, ids, 10, start)
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@MANNERS
def test_decoders_of_several_models_at_the_same_time(manner: str) -> None:
    ids = random_ids(1, 30)
    runs = model(0), model(1), model(2, ffn=320)
    decoders = [decoder_of(run, 1, 32, manner) for run in runs]
    logits = [[decoder.prefill(ids[:, :4])] for decoder in decoders]
    for token in ids[:, 4:].unbind(1):
        for decoder, found in zip(decoders, logits, strict=True):
            found.append(decoder.step(token).clone())
    for run, found in zip(runs, logits, strict=True):
        wanted = whole(run, ids, 4)
        assert (torch.stack(found, dim=1) - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
    reason="needs Hopper or later",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_that_overlap_give_the_same_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokengrow.kernels import triton_step

    run, ids = model(0, dtype), random_ids(1, 300)
    assert triton_step.overlaps(ids.device)
    overlapping = stepped(Decoder(run, 1, 300), ids, 5)
    monkeypatch.setattr(triton_step, "overlaps", lambda _: False)
    assert torch.equal(overlapping, stepped(Decoder(run, 1, 300), ids, 5))


def test_more_texts_than_the_kernels_take() -> None:
    run, ids = model(0), random_ids(6, 20)
    decoder = Decoder(run, 6, 20)
    assert decoder._kernels is None
    found, wanted = stepped(decoder, ids, 5), whole(run, ids, 5)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_weights_that_change_in_place_are_seen() -> None:
    run, ids = model(0), random_ids(1, 12)
    decoder = Decoder(run, 1, 12)
    stepped(decoder, ids, 4)
    with torch.no_grad():
        run.blocks[1].ffn.value_param_tokens.mul_(-2)
    found, wanted = stepped(decoder, ids, 4), whole(run, ids, 4)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_the_tokens_are_those_of_a_cpu() -> None:
    run, ids = model(0), random_ids(2, 10)
    config = SamplingConfig(max_tokens=30, temperature=0)
    found = torch.stack(list(generate(run, ids, config)))
    assert found.device.type == "cpu"
    assert torch.equal(found, torch.stack(list(generate(run.cpu(), ids.cpu(), config))))


def test_an_end_is_seen_at_once() -> None:
    run, ids = model(0), random_ids(1, 10)
    free = [int(token) for token in generate(run, ids, SamplingConfig(max_tokens=30))]
    end = free[12]
    found = [int(token) for token in generate(run, ids, SamplingConfig(max_tokens=30), end)]
    assert found == free[: free.index(end) + 1]


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"repetition_penalty": 1.2}])
@pytest.mark.parametrize("copies", [1, 2], ids=["kernels", "plain"])
def test_prompts_of_different_lengths(settings: dict[str, float], copies: int) -> None:
    run, config = model(0), SamplingConfig(max_tokens=30, **settings)
    prompts = [ids[:length] for ids, length in zip(random_ids(3, 20), (20, 3, 11), strict=True)]
    found = torch.stack(list(generate(run, prompts * copies, config)), dim=1)
    alone = [torch.stack(list(generate(run, prompt[None], config)), dim=1) for prompt in prompts]
    assert torch.equal(found, torch.cat(alone * copies))
