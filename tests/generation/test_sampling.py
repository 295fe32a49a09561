"""Sampling: which token is drawn, and when a text ends."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from tokengrow.errors import UserError
from tokengrow.generation.sampling import SamplingConfig, generate, pad_left, penalize, sample
from tokengrow.model.config import ModelConfig, ParameterTokens
from tokengrow.model.tokenformer import TokenFormer

VOCAB = 50
PROMPT = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


@pytest.fixture(scope="module")
def model() -> TokenFormer:
    """A random model whose logits have a spread of about 4."""
    sizes = ParameterTokens(query=12, key=12, value=12, output=10, ffn=24)
    config = ModelConfig(
        vocab_size=VOCAB,
        context_length=32,
        layers=2,
        width=16,
        heads=2,
        tokens=sizes,
        init="published",
    )
    built = TokenFormer(config).eval()
    built.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        built.embedding.weight.mul_(50)
    return built


@pytest.fixture(scope="module")
def restless(model: TokenFormer) -> TokenFormer:
    """The same, but its blocks count for more: what it likes best changes all the time."""
    built = deepcopy(model)
    with torch.no_grad():
        for name, weight in built.blocks.named_parameters():
            weight.mul_(10 if "value_param" in name else 1)
    return built


def tokens(model: TokenFormer, prompt: Tensor = PROMPT, end: int | None = None, **k: Any) -> Tensor:
    """All that is generated, [B, max_tokens]."""
    return torch.stack(list(generate(model, prompt, SamplingConfig(**k), end)), dim=1)


def draws(logits: list[float], number: int = 2000, **settings: Any) -> list[int]:
    """What so many draws from one row of logits give."""
    row, config = torch.tensor([logits]), SamplingConfig(**settings)
    generator = torch.Generator().manual_seed(0)
    return [int(sample(row, config, generator)) for _ in range(number)]


def drawn(logits: list[float], **settings: Any) -> set[int]:
    """Every token among them."""
    return set(draws(logits, **settings))


def each_alone(model: TokenFormer, prompts: list[Tensor], **settings: Any) -> list[list[int]]:
    """What is generated for each prompt by itself."""
    return [tokens(model, prompt[None], **settings)[0].tolist() for prompt in prompts]


def test_temperature_zero_takes_the_likeliest_token_of_a_full_forward(model: TokenFormer) -> None:
    ids = PROMPT
    for _ in range(10):
        with torch.no_grad():
            ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(tokens(model, max_tokens=10, temperature=0), ids[:, 5:])


def test_a_seed_gives_the_same_tokens_again(model: TokenFormer) -> None:
    first = tokens(model, max_tokens=20, seed=7)
    torch.manual_seed(123)  # the global generator has no part in it
    assert torch.equal(tokens(model, max_tokens=20, seed=7), first)
    assert not torch.equal(tokens(model, max_tokens=20, seed=8), first)


def test_top_k_of_one_is_greedy(model: TokenFormer) -> None:
    greedy = tokens(model, max_tokens=20, temperature=0)
    assert torch.equal(tokens(model, max_tokens=20, temperature=2.0, top_k=1), greedy)


def test_a_tiny_top_p_is_greedy(model: TokenFormer) -> None:
    greedy = tokens(model, max_tokens=20, temperature=0)
    assert torch.equal(tokens(model, max_tokens=20, temperature=2.0, top_p=1e-6), greedy)


def test_top_k_keeps_the_k_likeliest() -> None:
    assert drawn([0.1, 0.5, 0.3, 0.4], temperature=1.0, top_k=2) == {1, 3}
    assert drawn([0.1, 0.5, 0.3, 0.4], temperature=1.0, top_k=0) == {0, 1, 2, 3}
    assert drawn([0.1, 0.5, 0.3, 0.4], temperature=1.0, top_k=99) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.3, {2}), (0.5, {2}), (0.6, {2, 0}), (0.75, {2, 0}), (0.8, {2, 0, 3}), (1.0, {0, 1, 2, 3})],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: set[int]) -> None:
    # Probabilities 1/4, 1/16, 1/2, 3/16: from the likeliest on they reach 0.5, 0.75, 0.9375, 1.
    logits = torch.tensor([4.0, 1.0, 8.0, 3.0]).log().tolist()
    assert drawn(logits, temperature=1.0, top_p=top_p) == kept


def test_top_p_counts_after_temperature_and_top_k() -> None:
    # Top 2 of 8 : 4 : 3 : 1 leaves 2/3 and 1/3; the first alone reaches 0.6, where 8/16 would not.
    logits = torch.tensor([8.0, 4.0, 3.0, 1.0]).log().tolist()
    assert drawn(logits, temperature=1.0, top_p=0.6) == {0, 1}
    assert drawn(logits, temperature=1.0, top_k=2, top_p=0.6) == {0}
    # Temperature 1/2 squares them: 64 / 90 = 0.71 reaches 0.6 alone.
    assert drawn(logits, temperature=0.5, top_p=0.6) == {0}


def test_temperature_divides_the_logits() -> None:
    # Odds e^2 : 1 at temperature 1, e : 1 at temperature 2.
    for temperature, share in ((1.0, 0.8808), (2.0, 0.7311)):
        found = draws([2.0, 0.0], number=20000, temperature=temperature)
        assert found.count(0) / 20000 == pytest.approx(share, abs=0.01)


def test_the_draw_is_that_of_torch() -> None:
    rows = torch.randn(500, VOCAB, generator=torch.Generator().manual_seed(1)) * 3
    rows[:, 40:] = -torch.inf
    ours, theirs = (torch.Generator().manual_seed(2) for _ in range(2))
    for row in rows.split(1):
        found = sample(row, SamplingConfig(temperature=1.0), ours)
        assert torch.equal(found, torch.multinomial(row.softmax(-1), 1, generator=theirs)[:, 0])


def test_each_row_is_drawn_as_if_it_were_alone() -> None:
    rows = torch.randn(500, VOCAB, generator=torch.Generator().manual_seed(1)) * 3
    config = SamplingConfig(temperature=1.0, top_p=0.9, top_k=30)
    found = sample(rows, config, torch.Generator().manual_seed(2))
    alone = [sample(row, config, torch.Generator().manual_seed(2)) for row in rows.split(1)]
    assert torch.equal(found, torch.cat(alone))
    assert len(set(found.tolist())) > 10


def test_the_repetition_penalty_divides_what_is_above_zero_and_multiplies_what_is_below() -> None:
    logits = torch.tensor([[3.0, 3.0, -2.0, -2.0], [1.0, -1.0, 0.0, 5.0]])
    held = torch.tensor([[True, False, True, False], [True, True, True, False]])
    assert penalize(logits, held, 2.0).tolist() == [[1.5, 3.0, -4.0, -2.0], [0.5, -2.0, 0.0, 5.0]]
    assert torch.equal(penalize(logits, held, 1.0), logits)


def test_the_repetition_penalty_counts_prompt_and_text(model: TokenFormer) -> None:
    # A penalty past all reason: a token that is there already has no chance.
    found = tokens(model, max_tokens=20, temperature=0, repetition_penalty=1e6)
    for text, prompt in zip(found.tolist(), PROMPT.tolist(), strict=True):
        assert len(set(text)) == 20
        assert not set(text) & set(prompt)
    free = tokens(model, max_tokens=20, temperature=0)
    assert len(set(free[0].tolist())) < 20


def test_the_repetition_penalty_comes_before_temperature_and_top_p(model: TokenFormer) -> None:
    settings = {"max_tokens": 20, "repetition_penalty": 1e6}
    greedy = tokens(model, temperature=0, **settings)
    assert torch.equal(tokens(model, temperature=2.0, top_p=1e-6, **settings), greedy)
    assert torch.equal(tokens(model, temperature=2.0, top_k=1, **settings), greedy)


class TestPromptsOfDifferentLengths:
    PROMPTS = (
        torch.tensor([3, 1, 4, 1, 5, 9, 2]),
        torch.tensor([6]),
        torch.tensor([5, 3, 5]),
        torch.tensor([8, 9, 7, 9, 3, 2, 3]),
    )

    @pytest.mark.parametrize(
        "settings",
        [
            {"temperature": 0},
            {"temperature": 1.0},
            {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "seed": 5},
            {"temperature": 0, "repetition_penalty": 1.5},
            {"temperature": 1.0, "repetition_penalty": 1.3},
        ],
        ids=["greedy", "sampled", "top", "penalty", "sampled_penalty"],
    )
    def test_each_is_continued_as_by_itself(
        self, restless: TokenFormer, settings: dict[str, Any]
    ) -> None:
        prompts = list(self.PROMPTS)
        together = list(generate(restless, prompts, SamplingConfig(max_tokens=24, **settings)))
        alone = each_alone(restless, prompts, max_tokens=24, **settings)
        assert torch.stack(together, dim=1).tolist() == alone
        assert len({token for text in alone for token in text}) > 8

    def test_by_the_published_model_too(
        self, published_model: TokenFormer, published_decoding: dict[str, Tensor]
    ) -> None:
        whole = published_decoding["greedy.tokens"]  # [2, 24], 8 of them the prompt
        prompts = [whole[0, :8], whole[0, :3], whole[1, :8], whole[1, :5]]
        config = SamplingConfig(max_tokens=16, temperature=0)
        found = torch.stack(list(generate(published_model, prompts, config)), dim=1)
        assert torch.equal(found[[0, 2]], whole[:, 8:])
        for seed in (0, 1):
            settings = {"max_tokens": 16, "temperature": 1.0, "seed": seed}
            together = list(generate(published_model, prompts, SamplingConfig(**settings)))
            alone = each_alone(published_model, prompts, **settings)
            assert torch.stack(together, dim=1).tolist() == alone

    def test_they_end_in_the_same_column(self) -> None:
        ids, start = pad_left([torch.tensor([7, 8]), torch.tensor([5, 6, 7]), torch.tensor([9])])
        assert start is not None and start.tolist() == [1, 0, 2]
        # What is in front is of the prompt itself, so that no penalty counts anything foreign.
        assert ids.tolist() == [[7, 7, 8], [5, 6, 7], [9, 9, 9]]

    def test_prompts_of_one_length_have_no_padding(self) -> None:
        ids, start = pad_left([torch.tensor([7, 8]), torch.tensor([5, 6])])
        assert start is None
        assert ids.tolist() == [[7, 8], [5, 6]]

    def test_one_without_tokens_is_refused(self, model: TokenFormer) -> None:
        with pytest.raises(UserError, match="prompt is empty: give at least one token"):
            next(generate(model, [*self.PROMPTS, torch.tensor([])], SamplingConfig()))


def test_tokens_are_on_the_cpu_and_each_its_own(model: TokenFormer) -> None:
    found = list(generate(model, PROMPT, SamplingConfig(max_tokens=8)))
    assert all(token.device.type == "cpu" for token in found)
    assert len({token.data_ptr() for token in found}) == 8


def test_max_tokens_are_generated(model: TokenFormer) -> None:
    assert tokens(model, max_tokens=1).shape == (2, 1)
    assert tokens(model, max_tokens=40).shape == (2, 40)  # past the context of 32 as well


def test_a_text_that_ended_goes_on_yielding_the_end(model: TokenFormer) -> None:
    free = tokens(model, max_tokens=12, temperature=0)
    end = int(free[0, 3])
    first = int((free[0] == end).nonzero()[0])
    assert end not in free[1].tolist()
    found = tokens(model, end=end, max_tokens=12, temperature=0)
    assert torch.equal(found[0, : first + 1], free[0, : first + 1])
    assert found[0, first:].tolist() == [end] * (12 - first)
    assert torch.equal(found[1], free[1])


def test_generation_stops_when_every_text_has_ended(model: TokenFormer) -> None:
    free = tokens(model, PROMPT[:1], max_tokens=12, temperature=0)
    end = int(free[0, 3])
    first = int((free[0] == end).nonzero()[0])
    found = tokens(model, PROMPT[:1], end=end, max_tokens=12, temperature=0)
    assert torch.equal(found, free[:, : first + 1])


def test_an_empty_prompt_is_refused(model: TokenFormer) -> None:
    with pytest.raises(UserError, match="prompt is empty"):
        tokens(model, torch.empty(1, 0, dtype=torch.int64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, r"sampling\.max_tokens must be at least 1, got 0\."),
        ({"temperature": -0.1}, r"sampling\.temperature must be 0 or at least 0\.001, got -0\.1\."),
        (
            {"temperature": float("nan")},
            r"sampling\.temperature must be 0 or at least 0\.001, got nan\.",
        ),
        ({"top_k": -1}, r"sampling\.top_k must be 0 or more, got -1\."),
        ({"top_p": 0.0}, r"sampling\.top_p must be in \(0, 1\], got 0\.0\."),
        ({"top_p": 1.1}, r"sampling\.top_p must be in \(0, 1\], got 1\.1\."),
        (
            {"repetition_penalty": 0.0},
            r"sampling\.repetition_penalty must be a number above 0, got 0\.0\.",
        ),
        (
            {"repetition_penalty": float("inf")},
            r"sampling\.repetition_penalty must be .*, got inf\.",
        ),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingConfig(**settings)
