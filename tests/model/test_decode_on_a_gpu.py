"""The decoder's graphs on a GPU, plain and compiled; its arithmetic on a CPU: test_decode.py."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tokengrow.model.config import ModelConfig, Tokens
from tokengrow.model.decode import Decoder
from tokengrow.model.generate import SamplingConfig, generate
from tokengrow.model.tokenformer import TokenFormer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # Inductor's advice about precision and reductions
]

COMPILE = pytest.mark.parametrize("compile", [False, True], ids=["plain", "compiled"])


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def model(seed: int, dtype: torch.dtype = torch.float32, ffn: int = 384) -> TokenFormer:
    """Large enough for kernels to be split; its logits have a spread of about 1."""
    config = ModelConfig(
        vocab_size=1000,
        context_length=64,
        layers=4,
        width=256,
        heads=4,
        tokens=Tokens(query=256, key=256, value=256, output=192, ffn=ffn),
        init="published",
    )
    built = TokenFormer(config).eval()
    built.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        built.embedding.weight.mul_(3)
    return built.to("cuda", dtype)


def random_ids(*shape: int) -> Tensor:
    return torch.randint(1000, shape, generator=torch.Generator().manual_seed(1)).cuda()


def stepped(decoder: Decoder, ids: Tensor, prompt: int) -> Tensor:
    """Logits of the last token of the prompt and of all tokens behind it, one step each."""
    logits = [decoder.prefill(ids[:, :prompt])]
    logits += [decoder.step(token).clone() for token in ids[:, prompt:].unbind(1)]
    return torch.stack(logits, dim=1).float()


@torch.no_grad()
def whole(run: TokenFormer, ids: Tensor, prompt: int) -> Tensor:
    """The same from one forward pass."""
    return run(ids)[:, prompt - 1 :].float()


@COMPILE
def test_the_published_figures(
    published_model: TokenFormer, published_decoding: dict[str, Tensor], compile: bool
) -> None:
    decoder = Decoder(published_model.cuda(), 2, 32, compile)
    found = stepped(decoder, published_decoding["input_ids"].cuda(), 8).cpu()
    assert (found - published_decoding["full_forward_logits"][:, 7:]).abs().max() <= 5e-6


@COMPILE
@pytest.mark.parametrize("batch", [1, 3])
def test_float32(batch: int, compile: bool) -> None:
    run, ids = model(0), random_ids(batch, 40)
    found, wanted = stepped(Decoder(run, batch, 48, compile), ids, 5), whole(run, ids, 5)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@COMPILE
def test_bfloat16(compile: bool) -> None:
    ids = random_ids(1, 40)
    found = stepped(Decoder(model(0, torch.bfloat16), 1, 48, compile), ids, 5)
    wanted = whole(model(0), ids, 5)
    assert (found - wanted).norm() <= 0.05 * wanted.norm()


@COMPILE
def test_many_replays(compile: bool) -> None:
    run, ids = model(0), random_ids(1, 700)
    found, wanted = stepped(Decoder(run, 1, 700, compile), ids, 300), whole(run, ids, 300)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@COMPILE
def test_a_graph_serves_one_text_after_another(compile: bool) -> None:
    run, ids = model(0), random_ids(2, 40)
    decoder = Decoder(run, 2, 40, compile)
    first = stepped(decoder, ids, 30)
    stepped(decoder, ids.flip(1), 2)
    assert torch.equal(stepped(decoder, ids, 30), first)


@COMPILE
def test_decoders_of_several_models_at_the_same_time(compile: bool) -> None:
    ids = random_ids(1, 30)
    runs = model(0), model(1), model(2, ffn=320)
    decoders = [Decoder(run, 1, 32, compile) for run in runs]
    logits = [[decoder.prefill(ids[:, :4])] for decoder in decoders]
    for token in ids[:, 4:].unbind(1):
        for decoder, found in zip(decoders, logits, strict=True):
            found.append(decoder.step(token).clone())
    for run, found in zip(runs, logits, strict=True):
        wanted = whole(run, ids, 4)
        assert (torch.stack(found, dim=1) - wanted).norm() <= 1e-5 * wanted.norm()


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
