"""Texts of different lengths in one batch: padding on the left changes none of them."""

from typing import Any

import pytest
import torch
from torch import Tensor
from uneven import random_ids, uneven_model

from tokengrow.generation.decoder import Decoder
from tokengrow.kernels.reference import ACTIVATIONS
from tokengrow.model.rotary import rotary_table
from tokengrow.model.tokenformer import KVCache, TokenFormer

LENGTH, PROMPT = 14, 8
STARTS = torch.tensor([3, 0, 7])
"""Columns in which the texts of a batch start; the prompt of the last is one token."""


def model(**changes: Any) -> TokenFormer:
    """In float64, with half of each head rotated, so that positions weigh."""
    return uneven_model(torch.float64, **{"rotary_channels": 6, **changes})


def stepped(decoder: Decoder, ids: Tensor, prompt: int, start: Tensor | None = None) -> Tensor:
    """Logits [B, T - prompt + 1, V] of the prompt's last token and of all behind it."""
    logits = [decoder.prefill(ids[:, :prompt], start)]
    logits += [decoder.step(token).clone() for token in ids[:, prompt:].unbind(1)]
    return torch.stack(logits, dim=1)


@torch.no_grad()
def alone(run: TokenFormer, ids: Tensor, start: Tensor = STARTS, prompt: int = PROMPT) -> Tensor:
    """The same of each text by itself, without its padding, from one forward pass."""
    rows = zip(ids, start.tolist(), strict=True)
    return torch.cat([run(row[None, begin:])[:, prompt - 1 - begin :] for row, begin in rows])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_text_is_decoded_as_by_itself(activation: str) -> None:
    run, ids = model(activation=activation), random_ids(3, LENGTH)
    found, wanted = stepped(Decoder(run, 3, 16), ids, PROMPT, STARTS), alone(run, ids)
    assert wanted.std() > 1
    assert (found - wanted).abs().max() <= 1e-12


@pytest.mark.parametrize("rotary", [0, 12])
def test_for_any_part_of_a_head_rotated(rotary: int) -> None:
    run, ids = model(rotary_channels=rotary), random_ids(3, LENGTH)
    found = stepped(Decoder(run, 3, 16), ids, PROMPT, STARTS)
    assert (found - alone(run, ids)).abs().max() <= 1e-12


def test_the_published_model_too(
    published_model: TokenFormer, published_decoding: dict[str, Tensor]
) -> None:
    text = published_decoding["input_ids"]  # [2, 32]
    start = torch.tensor([5, 0])
    ids = torch.stack([text[0].roll(5), text[1]])  # the first one's end is its padding
    found = stepped(Decoder(published_model, 2, 32), ids, 8, start)
    published = published_decoding["full_forward_logits"]
    wanted = torch.stack([published[0, 2:27], published[1, 7:]])
    assert (found - wanted).abs().max() <= 5e-6


def test_what_the_padding_is_does_not_count() -> None:
    run, ids = model(), random_ids(3, LENGTH)
    padding = torch.arange(LENGTH) < STARTS[:, None]
    others = torch.where(padding, random_ids(3, LENGTH, seed=2), ids)
    assert not torch.equal(ids, others)
    first, second = (stepped(Decoder(run, 3, 16), each, PROMPT, STARTS) for each in (ids, others))
    assert torch.equal(first, second)


def test_a_decoder_takes_texts_with_padding_and_without_in_turn() -> None:
    run, ids = model(), random_ids(3, LENGTH)
    decoder, none = Decoder(run, 3, 16), torch.zeros(3, dtype=torch.int64)
    for start in (None, STARTS, STARTS.flip(0), None):
        wanted = alone(run, ids, none if start is None else start)
        assert (stepped(decoder, ids, PROMPT, start) - wanted).abs().max() <= 1e-12


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[14], [8, 6], [8, 1, 1, 1, 1, 1, 1], [10, 3, 1]])
def test_the_model_itself_takes_padding_from_its_cache(chunks: list[int]) -> None:
    run, ids = model(), random_ids(3, LENGTH)
    cache = KVCache(run.config, 3, LENGTH, torch.float64)
    cache.start = STARTS
    logits = torch.cat([run(chunk, cache) for chunk in ids.split(chunks, dim=1)], dim=1)
    assert logits.isfinite().all()
    assert (logits[:, PROMPT - 1 :] - alone(run, ids)).abs().max() <= 1e-12


class TestCache:
    def cache(self, start: list[int] | None, length: int) -> KVCache:
        cache = KVCache(model().config, 2, LENGTH)
        cache.start = None if start is None else torch.tensor(start)
        cache.length = length
        return cache

    def test_padding_sees_itself_and_nobody_else_sees_it(self) -> None:
        seen = self.cache([2, 0], length=1).attention_mask(3)
        assert seen is not None
        first, second = seen[:, 0].int().tolist()
        assert first == [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
        assert second == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]

    def test_without_padding_a_chunk_is_causal_and_the_rest_needs_no_mask(self) -> None:
        assert self.cache(None, length=0).attention_mask(3) is None
        assert self.cache(None, length=2).attention_mask(1) is None
        seen = self.cache(None, length=1).attention_mask(2)
        assert seen is not None
        assert seen.int().tolist() == [[1, 1, 0], [1, 1, 1]]

    def test_positions_are_counted_from_where_a_text_starts(self) -> None:
        assert self.cache(None, length=5).position == 5
        position = self.cache([2, 0], length=5).position
        assert isinstance(position, Tensor) and position.tolist() == [3, 5]


def test_a_table_of_several_starts_is_those_of_each() -> None:
    cpu = torch.device("cpu")
    together = rotary_table(torch.tensor([4, 0]), 3, 6, 10000.0, cpu)
    for row, start in enumerate((4, 0)):
        apart = rotary_table(start, 3, 6, 10000.0, cpu)
        assert all(torch.equal(t[row], a) for t, a in zip(together, apart, strict=True))
