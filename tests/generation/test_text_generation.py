"""Prompts into texts: where they end, what is shown meanwhile."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tokengrow.data.store import TokenStore
from tokengrow.generation import text_generation as texts
from tokengrow.generation.sampling import SamplingConfig
from tokengrow.generation.text_generation import (
    Continuation,
    begun_stop,
    complete,
    first_stop,
    write,
)
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import TokenFormer


class Pieces:
    """A tokenizer whose ids are those of given strings, from 1 on; 0 ends a text."""

    end_of_text = 0

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = pieces

    def decoder(self, behind: Sequence[int]) -> Callable[[int], str]:
        return lambda token: self.pieces[token - 1]


LETTERS = Pieces([chr(code) for code in range(1, 128)])
"""Of single characters; the id of each is its code."""

Says = Callable[..., Any]


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Says:
    """`says(*lines)`: a model that would write these ids, or these letters, whatever the prompts;
    behind them it ends the text."""

    def make(*lines: str | list[int]) -> object:
        rows = [list(map(ord, line)) if isinstance(line, str) else line for line in lines]

        def generate(
            model: object, prompts: list[Tensor], config: SamplingConfig, end: int
        ) -> Iterator[Tensor]:
            most = config.max_tokens
            yield from torch.tensor([(row + [end] * most)[:most] for row in rows]).T

        monkeypatch.setattr(texts, "generate", generate)
        return object()

    return make


def continued(
    model: Any,
    max_tokens: int = 20,
    stop: Sequence[str] = (),
    lines: int = 1,
    tokenizer: Pieces = LETTERS,
) -> list[Continuation]:
    return complete(model, [[1]] * lines, tokenizer, SamplingConfig(max_tokens=max_tokens), stop)


class TestTheEnd:
    def test_by_end_of_text_which_is_not_part_of_it(self, says: Says) -> None:
        assert continued(says("abc\0de")) == [Continuation("abc", 3, "end_of_text")]

    def test_by_max_tokens(self, says: Says) -> None:
        assert continued(says("abcde"), max_tokens=4) == [Continuation("abcd", 4, "max_tokens")]

    def test_by_a_stop_string_which_is_not_part_of_it(self, says: Says) -> None:
        found = continued(says("one.\n\nTwo"), stop=["\n\n"])
        assert found == [Continuation("one.", 6, "stop")]

    def test_each_text_by_what_it_meets_first(self, says: Says) -> None:
        model = says("ab\0", "abcdefgh", "a;b", "\0", ";")
        assert continued(model, lines=5, max_tokens=5, stop=[";"]) == [
            Continuation("ab", 2, "end_of_text"),
            Continuation("abcde", 5, "max_tokens"),
            Continuation("a", 2, "stop"),
            Continuation("", 0, "end_of_text"),
            Continuation("", 1, "stop"),
        ]

    def test_comes_as_soon_as_all_have_ended(self, says: Says) -> None:
        prompts = [[1], [1]]
        model = says("ab;defgh", "a;bcdefg")
        steps = list(write(model, prompts, LETTERS, SamplingConfig(max_tokens=8), [";"]))
        assert len(steps) == 3

    def test_what_was_held_back_in_vain_is_part_of_the_text(self, says: Says) -> None:
        model = says("ab##\0", "abcde##e")
        found = continued(model, lines=2, max_tokens=7, stop=["###"])
        assert [text.text for text in found] == ["ab##", "abcde##"]

    def test_no_prompts_no_texts(self, says: Says) -> None:
        assert continued(says("abc"), lines=0) == []


class TestStopStrings:
    @pytest.mark.parametrize(
        ("text", "stop", "place"),
        [
            ("abcd", ["cd", "b"], 1),
            ("abcd", ["abc", "b"], 1),  # "b" is complete before "abc" is
            ("abcd", ["bc", "abc", "c"], 0),  # complete together: the longest
            ("abab", ["ab"], 0),
            ("abcd", ["x"], None),
            ("abcd", [], None),
        ],
    )
    def test_the_first_that_is_complete_counts(
        self, text: str, stop: list[str], place: int | None
    ) -> None:
        assert first_stop(text, stop) == place

    @pytest.mark.parametrize(
        ("text", "begun"),
        [("ab", 0), ("a#", 1), ("a##", 2), ("#a", 0), ("a##E", 3), ("\n", 1), ("#\n", 1)],
    )
    def test_only_what_may_begin_one_is_held_back(self, text: str, begun: int) -> None:
        assert begun_stop(text, ["##END", "\n\n"]) == begun

    def test_what_is_held_back_comes_when_it_is_none(self, says: Says) -> None:
        sampling = SamplingConfig(max_tokens=9)
        shown = [
            step[0].text for step in write(says("a##b###cd"), [[1]], LETTERS, sampling, ["###"])
        ]
        assert shown == ["a", "a", "a", "a##b", "a##b", "a##b", "a##b"]

    @pytest.mark.parametrize("size", [1, 2, 3, 5, 12])
    def test_a_text_ends_at_the_same_place_whatever_its_tokens(self, says: Says, size: int) -> None:
        text, stop = "ab##a#b###cd", ["#b#", "b###c", "##c"]
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        model = says(list(range(1, len(pieces) + 1)))
        [found] = continued(model, stop=stop, tokenizer=Pieces(pieces))
        assert (found.text, found.finish_reason) == ("ab##a", "stop")


def test_an_empty_stop_string_is_a_mistake_of_the_caller(says: Says) -> None:
    with pytest.raises(AssertionError, match="would end every text"):
        continued(says("abc"), stop=["a", ""])


def test_texts_of_a_real_model_are_those_that_each_prompt_has_alone(
    store: TokenStore, tiny_model: Callable[..., ModelConfig]
) -> None:
    tokenizer = store.tokenizer()
    model = TokenFormer(tiny_model(init="published")).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.embedding.weight.mul_(20)
    prompts = tokenizer.encode_batch(["def f(x):", "import", "class A:\n    def __init__(self):"])
    for settings in ({"temperature": 0.0}, {"temperature": 1.0, "repetition_penalty": 1.2}):
        sampling = SamplingConfig(max_tokens=30, **settings)
        together = complete(model, prompts, tokenizer, sampling, ["e", "\n"])
        assert together == [
            complete(model, [prompt], tokenizer, sampling, ["e", "\n"])[0] for prompt in prompts
        ]
        assert all(text.finish_reason for text in together)
