"""The decoder: its steps against the full forward, its limits."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from uneven import random_ids, uneven_model

from tokengrow.generation.decoder import Decoder
from tokengrow.kernels.reference import ACTIVATIONS
from tokengrow.model.tokenformer import TokenFormer


def stepped(decoder: Decoder, ids: Tensor, prompt: int) -> Tensor:
    """Logits of the last token of the prompt and of all tokens behind it, one step each."""
    logits = [decoder.prefill(ids[:, :prompt])]
    logits += [decoder.step(token).clone() for token in ids[:, prompt:].unbind(1)]
    return torch.stack(logits, dim=1)


@torch.no_grad()
def whole(run: TokenFormer, ids: Tensor, prompt: int) -> Tensor:
    """The same from one forward pass."""
    return run(ids)[:, prompt - 1 :]


class TestSteps:
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
    def test_equal_the_full_forward(
        self, activation: str, batch: int, dtype: torch.dtype, limit: float
    ) -> None:
        run, ids = uneven_model(dtype, activation=activation), random_ids(batch, 20)
        found, wanted = stepped(Decoder(run, batch, 24), ids, 5), whole(run, ids, 5)
        assert found.dtype == dtype
        assert wanted.std() > 1
        assert (found - wanted).abs().max() <= limit

    def test_in_bfloat16(self) -> None:
        ids = random_ids(2, 20)
        found = stepped(Decoder(uneven_model(torch.bfloat16), 2, 20), ids, 5)
        wanted = whole(uneven_model(), ids, 5)
        assert found.dtype == torch.bfloat16
        assert (found - wanted).norm() / wanted.norm() < 0.05

    @pytest.mark.parametrize("rotary", [0, 2, 12])
    def test_for_any_part_of_a_head_rotated(self, rotary: int) -> None:
        run, ids = uneven_model(torch.float64, rotary_channels=rotary), random_ids(1, 12)
        found = stepped(Decoder(run, 1, 12), ids, 3)
        assert (found - whole(run, ids, 3)).abs().max() <= 1e-12

    def test_equal_the_published_figures(
        self, published_model: TokenFormer, published_decoding: dict[str, Tensor]
    ) -> None:
        found = stepped(Decoder(published_model, 2, 32), published_decoding["input_ids"], 8)
        wanted = published_decoding["full_forward_logits"][:, 7:]
        assert (found - wanted).abs().max() <= 5e-6

    def test_whatever_fresh_memory_holds(self, nan_in_fresh_memory: None) -> None:
        run, ids = uneven_model(), random_ids(1, 6)
        assert torch.empty(1).isnan()
        assert stepped(Decoder(run, 1, 12), ids, 2).isfinite().all()

    def test_a_prompt_begins_a_new_text(self) -> None:
        run, ids = uneven_model(), random_ids(2, 12)
        decoder = Decoder(run, 2, 12)
        first = stepped(decoder, ids, 4)
        stepped(decoder, ids.flip(1), 6)
        assert torch.equal(stepped(decoder, ids, 4), first)

    def test_only_the_last_token_of_a_prompt_is_given_to_the_head(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shapes, logits = [], TokenFormer.logits
        monkeypatch.setattr(
            TokenFormer, "logits", lambda self, x: shapes.append(tuple(x.shape)) or logits(self, x)
        )
        Decoder(uneven_model(), 2, 8).prefill(random_ids(2, 5))
        assert shapes == [(2, 16)]

    def test_leave_no_gradients(self) -> None:
        decoder = Decoder(uneven_model(), 1, 4)
        assert not stepped(decoder, random_ids(1, 4), 2).requires_grad


@pytest.fixture
def nan_in_fresh_memory() -> Iterator[None]:
    """`torch.empty` gives NaN, as torch does where it is asked for the same bits every time."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class TestCapacity:
    def test_a_prompt_may_fill_it(self) -> None:
        run, ids = uneven_model(), random_ids(2, 8)
        decoder = Decoder(run, 2, 8)
        assert (decoder.prefill(ids) - whole(run, ids, 8)[:, 0]).abs().max() <= 2e-5
        with pytest.raises(ValueError, match="must hold 9 tokens, but has 8 slots"):
            decoder.step(ids[:, 0])

    def test_steps_may_fill_it(self) -> None:
        ids = random_ids(1, 8)
        decoder = Decoder(uneven_model(), 1, 8)
        first = stepped(decoder, ids, 1)
        with pytest.raises(ValueError, match="must hold 9 tokens, but has 8 slots"):
            decoder.step(ids[:, 0])
        assert torch.equal(stepped(decoder, ids, 1), first)

    def test_a_longer_prompt_is_refused(self) -> None:
        with pytest.raises(ValueError, match="must hold 9 tokens, but has 8 slots"):
            Decoder(uneven_model(), 1, 8).prefill(random_ids(1, 9))
