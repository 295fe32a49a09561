"""Perplexity: its windows, its counts, and figures worked out by hand."""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.metrics import bits_per_byte, weighted_perplexity
from lm_eval.api.task import ConfigurableTask
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.console import Console
from tokenizers import Tokenizer as Inner
from tokenizers import models
from torch import Tensor, nn

from tokengrow.data.corpus import Split, TextCorpus
from tokengrow.data.store import TokenStore
from tokengrow.data.tokenizer import END_OF_TEXT, Tokenizer
from tokengrow.errors import UserError
from tokengrow.evaluation import perplexity
from tokengrow.evaluation.perplexity import (
    Perplexity,
    PerplexityConfig,
    count_words,
    measure_perplexity,
    perplexity_caption,
    perplexity_table,
    select_documents,
)
from tokengrow.evaluation.rolling_windows import rolling_spans
from tokengrow.evaluation.scoring import Scorer, Window
from tokengrow.model.config import ModelConfig, Tokens
from tokengrow.model.tokenformer import TokenFormer
from tokengrow.parsing import parse_dataclass

PROBABILITIES = {END_OF_TEXT: 1 / 32, "é": 1 / 32, "b": 1 / 16, " ": 1 / 8, "a": 1 / 4, "ab": 1 / 2}
"""Of the tokens of the hand-worked model, whatever comes before: 5, 5, 4, 3, 2 and 1 bits."""


@pytest.fixture
def tokenizer() -> Tokenizer:
    """Six tokens: `abab é` is `ab`, `ab`, ` `, `é`."""
    vocabulary = {token: number for number, token in enumerate(PROBABILITIES)}
    return Tokenizer(Inner(models.BPE(vocabulary, [("a", "b")])))


@pytest.fixture
def unigram() -> TokenFormer:
    """A TokenFormer with weights set by hand: its last hidden state is always the first unit
    vector, so that the first channel of the embedding holds the logits."""
    config = ModelConfig(
        vocab_size=len(PROBABILITIES),
        context_length=4,
        layers=1,
        width=8,
        heads=2,
        tokens=Tokens(query=4, key=4, value=4, output=4, ffn=8),
    )
    model = TokenFormer(config).double()
    with torch.no_grad():
        model.embedding.weight[:, 0] = torch.tensor([*PROBABILITIES.values()]).double().log()
        model.final_norm.weight.zero_()
        model.final_norm.bias.copy_(torch.eye(8)[0])
    return model


class Stub(nn.Module):
    """Six tokens, a context of four, and no weights to speak of."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(context_length=4)
        self.nothing = nn.Parameter(torch.zeros(0))

    def logits(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class Counting(Stub):
    """Gives token 4, `a`, the probability 2^-k where it has read k tokens: what k is, is seen in
    the score."""

    def hidden_states(self, ids: Tensor) -> Tensor:
        probability = 0.5 ** torch.arange(1, ids.shape[1] + 1).double()
        logits = ((1 - probability) / 5).log().repeat(6, 1).T.contiguous()
        logits[:, 4] = probability.log()
        return logits.expand(len(ids), -1, -1)


class Watched(Stub):
    """Keeps what it reads, and knows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[list[int]] = []

    def hidden_states(self, ids: Tensor) -> Tensor:
        self.read += ids.tolist()
        return torch.zeros(*ids.shape, 6)


class TestWorkedByHand:
    def test_two_documents_of_a_model_of_known_probabilities(
        self, unigram: TokenFormer, tokenizer: Tokenizer
    ) -> None:
        # `abab a`: ab ab ␣ a = 1 + 1 + 3 + 2 = 7 bits of 6 bytes and 2 words.
        # `é a`:    é ␣ a     = 5 + 3 + 2     = 10 bits of 4 bytes and 2 words.
        found = measure_perplexity(["abab a", "é a"], tokenizer, Scorer(unigram))
        counts = found.documents, found.tokens, found.bytes, found.words
        assert counts == (2, 7, 10, 4)
        assert found.nats == pytest.approx(17 * math.log(2), rel=1e-12)
        assert found.loss == pytest.approx(17 / 7 * math.log(2), rel=1e-12)
        assert found.token_perplexity == pytest.approx(2 ** (17 / 7), rel=1e-12)
        assert found.bits_per_byte == pytest.approx(1.7, rel=1e-12)
        assert found.byte_perplexity == pytest.approx(2**1.7, rel=1e-12)
        assert found.word_perplexity == pytest.approx(2 ** (17 / 4), rel=1e-12)

    @pytest.mark.parametrize(
        ("stride", "bits"),
        [
            # Seven times `a` in windows of 4: so many tokens are read in front of each.
            (4, (1 + 2 + 3 + 4) + (2 + 3 + 4)),
            (3, (1 + 2 + 3 + 4) + (2 + 3 + 4)),
            (2, (1 + 2 + 3 + 4) + (3 + 4) + 4),
            (1, (1 + 2 + 3 + 4) + 4 + 4 + 4),
        ],
    )
    def test_the_stride_decides_how_much_a_token_has_before_it(
        self, tokenizer: Tokenizer, stride: int, bits: int
    ) -> None:
        found = measure_perplexity(["aaaaaaa"], tokenizer, Scorer(Counting()), stride)
        assert found.nats == pytest.approx(bits * math.log(2), rel=1e-12)

    def test_the_first_token_of_each_document_has_end_of_text_before_it(
        self, tokenizer: Tokenizer
    ) -> None:
        model = Watched()
        measure_perplexity(["aabbb", "b b"], tokenizer, Scorer(model, batch_size=1))
        assert model.read == [[0, 4, 5, 2], [0, 2, 3]], "a ab b(b); b ␣ (b)"

    def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(
        self, unigram: TokenFormer, tokenizer: Tokenizer
    ) -> None:
        nn.init.zeros_(unigram.embedding.weight)
        found = measure_perplexity(["abab é", "ba"], tokenizer, Scorer(unigram))
        assert found.token_perplexity == pytest.approx(6, rel=1e-12)


class TestSpans:
    def test_disjoint_ones_the_last_of_which_reads_as_much_as_the_others(self) -> None:
        assert [*rolling_spans(10, 4, 4)] == [(0, 1, 4), (4, 5, 8), (6, 9, 10)]

    def test_sliding_ones(self) -> None:
        assert [*rolling_spans(10, 4, 2)] == [(0, 1, 4), (2, 5, 6), (4, 7, 8), (6, 9, 10)]

    def test_a_text_shorter_than_a_window_is_one(self) -> None:
        assert [*rolling_spans(3, 4, 2)] == [(0, 1, 3)]

    def test_nothing_has_none(self) -> None:
        assert [*rolling_spans(0, 4, 2)] == []

    @given(st.data())
    def test_every_token_is_predicted_once_from_as_much_as_the_stride_leaves(
        self, data: st.DataObject
    ) -> None:
        tokens, context_length = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 40))
        stride = data.draw(st.integers(1, context_length))
        found = [*rolling_spans(tokens, context_length, stride)]
        assert [found[0].first, found[-1].last] == [1, tokens]
        assert all(after.first == before.last + 1 for before, after in pairwise(found))
        assert all(0 <= each.start < each.first <= each.last for each in found)
        assert all(each.last - each.start <= context_length for each in found)
        for each in found[1:]:
            assert each.last - each.start == context_length
            assert each.last - each.first < stride
            assert each.first - each.start >= context_length - stride + 1

    @given(st.data())
    def test_they_are_those_of_the_lm_evaluation_harness(self, data: st.DataObject) -> None:
        tokens, context_length = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 40))
        stride = data.draw(st.integers(1, context_length))
        theirs = get_rolling_token_windows(
            [*range(1, tokens + 1)], 0, context_length, context_length - stride + 1
        )
        for (start, first, last), (read, predicted) in zip(
            rolling_spans(tokens, context_length, stride), theirs, strict=True
        ):
            assert [*range(start, last)] == read
            assert [*range(first, last + 1)] == predicted


@pytest.fixture
def texts(corpus: TextCorpus) -> list[str]:
    """Three documents of which one is longer than a window, one shorter, and one is one letter."""
    first, second, _ = corpus.documents("validation")
    return [first[:600], second[:20], "é"]


def test_each_token_has_the_probability_that_its_own_forward_pass_gives(
    published_model: TokenFormer, store: TokenStore, texts: list[str]
) -> None:
    tokenizer, model, context_length = store.tokenizer(), published_model.double(), 32
    for stride in (1, 7, 32):
        nats = 0.0
        for text in texts:
            at = [tokenizer.end_of_text, *tokenizer.encode(text)]
            for place in range(1, len(at)):
                behind_first = max(0, place - context_length)  # tokens beyond the first window
                end = context_length + math.ceil(behind_first / stride) * stride
                start = max(0, min(end, len(at) - 1) - context_length) if behind_first else 0
                with torch.no_grad():
                    logits = model(torch.tensor([at[start:place]]))[0, -1]
                nats -= logits.log_softmax(-1)[at[place]].item()
        found = measure_perplexity(texts, tokenizer, Scorer(model), stride)
        assert found.nats == pytest.approx(nats, rel=1e-12)


def test_the_batch_size_changes_nothing(
    published_model: TokenFormer, store: TokenStore, texts: list[str]
) -> None:
    alone, together = (
        measure_perplexity(texts, store.tokenizer(), Scorer(published_model.double(), size), 20)
        for size in (1, 16)
    )
    assert alone.nats == pytest.approx(together.nats, rel=1e-12)
    assert alone.tokens == together.tokens


def test_a_text_in_several_chunks_is_the_same_text(
    published_model: TokenFormer,
    store: TokenStore,
    texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scorer = Scorer(published_model.double())
    whole = measure_perplexity(texts, store.tokenizer(), scorer)
    monkeypatch.setattr(perplexity, "TOKENS_AT_ONCE", 40)
    monkeypatch.setattr(perplexity, "BATCH_CHARACTERS", 10)
    in_pieces = measure_perplexity(texts, store.tokenizer(), scorer)
    assert in_pieces.nats == pytest.approx(whole.nats, rel=1e-12)
    assert in_pieces.tokens == whole.tokens


def test_a_stream_cut_by_spans_is_what_training_validates_on(
    published_model: TokenFormer, store: TokenStore
) -> None:
    sequences = store.sequences("validation", 32)
    stream = sequences.tokens.read(0, len(sequences) * 32 + 1)
    found = [*rolling_spans(len(stream) - 1, 32, 32)]
    cut = torch.stack([torch.from_numpy(stream[span.start : span.last + 1]) for span in found])
    batch = torch.stack([*sequences])
    assert torch.equal(cut, batch)
    windows = [Window(row[:1], row[1:]) for row in cut.tolist()]
    scored = Scorer(published_model).score(windows)
    with torch.no_grad():
        loss = published_model(batch[:, :-1], targets=batch[:, 1:]).item()
    nats = sum(each.log_likelihood for each in scored)
    assert -nats / (len(stream) - 1) == pytest.approx(loss, rel=1e-6)


class TestLikeTheHarness:
    @pytest.mark.parametrize(
        "text", ["two words", " and\u2003more \n", "one", "\n", "a\x1cb\u200bc", "Zoë’s naïve café"]
    )
    def test_words_and_bytes_are_counted_alike(self, tokenizer: Tokenizer, text: str) -> None:
        assert count_words(text) == ConfigurableTask.count_words(text)
        assert len(text.encode()) == ConfigurableTask.count_bytes(text)

    def test_its_metrics_of_the_same_documents_are_ours(
        self, published_model: TokenFormer, store: TokenStore, texts: list[str]
    ) -> None:
        tokenizer, scorer = store.tokenizer(), Scorer(published_model.double())
        likelihoods = []
        for text in texts:
            rolling = get_rolling_token_windows(
                tokenizer.encode(text), tokenizer.end_of_text, 32, context_len=1
            )
            windows = [Window(*make_disjoint_window(each)) for each in rolling]
            likelihoods.append(sum(each.log_likelihood for each in scorer.score(windows)))
        words = [*zip(likelihoods, map(ConfigurableTask.count_words, texts), strict=True)]
        sizes = [*zip(likelihoods, map(ConfigurableTask.count_bytes, texts), strict=True)]
        ours = measure_perplexity(texts, tokenizer, scorer)
        assert ours.word_perplexity == pytest.approx(weighted_perplexity(words), rel=1e-11)
        assert ours.byte_perplexity == pytest.approx(weighted_perplexity(sizes), rel=1e-11)
        assert ours.bits_per_byte == pytest.approx(bits_per_byte(sizes), rel=1e-11)


class Documents:
    """A corpus with both splits in memory."""

    def __init__(self, train: list[str], validation: list[str]) -> None:
        self.splits = {"train": train, "validation": validation}

    def documents(self, split: Split) -> Iterator[str]:
        return iter(self.splits[split])

    def identity(self) -> dict[str, Any]:
        return {}


TEXT = Documents(train=["one", "two"], validation=["drei", "vïer", "fünf"])


class TestDocuments:
    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({}, ["drei", "vïer", "fünf"]),
            ({"split": "train"}, ["one", "two"]),
            ({"split": "all"}, ["one", "two", "drei", "vïer", "fünf"]),
            ({"max_bytes": 4}, ["drei"]),
            ({"max_bytes": 6}, ["drei", "v"]),  # the ï takes bytes 6 and 7
            ({"max_bytes": 7}, ["drei", "vï"]),
            ({"max_bytes": 9}, ["drei", "vïer"]),
        ],
    )
    def test_those_of_the_split_up_to_a_number_of_bytes(
        self, settings: dict[str, Any], expected: list[str]
    ) -> None:
        config = parse_dataclass(PerplexityConfig, settings, "perplexity")
        assert [*select_documents(TEXT, config)] == expected

    def test_up_to_a_number_of_documents(self) -> None:
        assert [*select_documents(TEXT, PerplexityConfig(split="all"), 3)] == ["one", "two", "drei"]

    def test_a_split_without_documents_is_refused(self) -> None:
        with pytest.raises(UserError, match=r"validation split .* perplexity\.split=all"):
            select_documents(Documents(["one"], []), PerplexityConfig())
        with pytest.raises(UserError, match="check data"):
            select_documents(Documents([], []), PerplexityConfig(split="all"))


class TestRefused:
    @pytest.mark.parametrize("settings", [{"stride": 0}, {"max_bytes": 0}, {"split": "test"}])
    def test_a_setting_out_of_range(self, settings: dict[str, Any]) -> None:
        (key,) = settings
        with pytest.raises(UserError, match=rf"perplexity\.{key}"):
            parse_dataclass(PerplexityConfig, settings, "perplexity")

    def test_a_stride_that_would_leave_tokens_out(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(UserError, match=r"perplexity\.stride is 5, .* give 4 at most"):
            measure_perplexity(["a"], tokenizer, Scorer(Watched()), stride=5)

    def test_text_without_tokens(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(UserError, match="no tokens"):
            measure_perplexity(["?"], tokenizer, Scorer(Watched()))


class TestShown:
    found = Perplexity(
        documents=2,
        bytes=10,
        words=4,
        text_sha256="8bb3c4",
        tokens=7,
        nats=17 * math.log(2),
        context_length=4,
        stride=4,
    )

    def test_the_table_has_the_ratios(self) -> None:
        console = Console(width=80, record=True, file=StringIO())
        console.print(perplexity_table(self.found))
        lines = [line.split() for line in console.export_text().splitlines() if line.strip()]
        values = {" ".join(words[:-1]): words[-1] for words in lines[3:]}
        assert values == {
            "loss (nats per token)": "1.68336",  # 17 / 7 ln 2
            "token perplexity": "5.3836",  # 2 to the power of 17 / 7
            "bits per byte": "1.70000",
            "word perplexity": "19.0273",
        }

    def test_the_text_is_known_by_its_documents(
        self, unigram: TokenFormer, tokenizer: Tokenizer
    ) -> None:
        def known(*texts: str) -> str:
            return measure_perplexity(texts, tokenizer, Scorer(unigram)).text_sha256

        # The documents, each behind its length in bytes.
        assert known("abab a", "é a") == hashlib.sha256("6\nabab a4\né a".encode()).hexdigest()
        assert known("ab", "a") != known("a", "ab") != known("aba")

    def test_what_was_measured_is_told_in_two_lines(self) -> None:
        assert perplexity_caption(self.found) == (
            "2 documents: 10 bytes, 4 words, 7 tokens\nwindows of 4 tokens, 4 of them new"
        )

    def test_as_json_a_perplexity_beyond_all_floats_is_null(self) -> None:
        values = replace(self.found, nats=2900.0).to_dict()
        assert values["nats"] == 2900.0
        assert values["word_perplexity"] is None, "e to the power of 725"
        assert values["byte_perplexity"] == pytest.approx(math.exp(290))

    @pytest.mark.parametrize("nats", [17.25, math.nan])
    def test_what_is_read_from_json_is_what_was_written(self, nats: float) -> None:
        found = replace(self.found, nats=nats)
        again = Perplexity.from_dict(json.loads(json.dumps(found.to_dict())))
        assert repr(again) == repr(found)

    def test_the_progress_ends_with_the_perplexity_of_the_whole(
        self, unigram: TokenFormer, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        texts = ["abab a", "é a"]
        scorer, console = Scorer(unigram, batch_size=1), Console(stderr=True)
        measure_perplexity(texts, tokenizer, scorer, console=console)
        assert "perplexity 5.3836, 7 tokens, " in capsys.readouterr().err
