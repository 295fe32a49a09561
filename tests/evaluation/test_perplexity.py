"""Perplexity: values worked out by hand, counts, selection of documents, and display."""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval.api.metrics import bits_per_byte, weighted_perplexity
from lm_eval.api.task import ConfigurableTask
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.console import Console
from tokenizers import Tokenizer as TokenizersTokenizer
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
from tokengrow.model.config import ModelConfig, ParameterTokens
from tokengrow.model.tokenformer import TokenFormer
from tokengrow.parsing import parse_dataclass

PROBABILITIES = {END_OF_TEXT: 1 / 32, "é": 1 / 32, "b": 1 / 16, " ": 1 / 8, "a": 1 / 4, "ab": 1 / 2}
"""Token to its probability in the unigram model: 5, 5, 4, 3, 2 and 1 bits, in any context."""


@pytest.fixture
def tokenizer() -> Tokenizer:
    """Tokenizer of six tokens: `abab é` is `ab`, `ab`, ` `, `é`."""
    vocabulary = {token: number for number, token in enumerate(PROBABILITIES)}
    return Tokenizer(TokenizersTokenizer(models.BPE(vocabulary, [("a", "b")])))


@pytest.fixture
def unigram() -> TokenFormer:
    """TokenFormer with weights set by hand.

    Its last hidden state is always the first unit vector, so the first channel of the embedding
    holds the logits.
    """
    config = ModelConfig(
        vocab_size=len(PROBABILITIES),
        context_length=4,
        layers=1,
        width=8,
        heads=2,
        tokens=ParameterTokens(query=4, key=4, value=4, output=4, ffn=8),
    )
    model = TokenFormer(config).double()
    with torch.no_grad():
        model.embedding.weight[:, 0] = torch.tensor([*PROBABILITIES.values()]).double().log()
        model.final_norm.weight.zero_()
        model.final_norm.bias.copy_(torch.eye(8)[0])
    return model


class StubModel(nn.Module):
    """Model interface with six tokens, a context of four and one empty parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(context_length=4)
        self.empty = nn.Parameter(torch.zeros(0))

    def logits(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class PositionModel(StubModel):
    """Model that gives token 4, `a`, the probability 2^-k after k tokens.

    The score of `a` therefore shows how many tokens the model has read.
    """

    def hidden_states(self, ids: Tensor) -> Tensor:
        probability = 0.5 ** torch.arange(1, ids.shape[1] + 1).double()
        logits = ((1 - probability) / 5).log().repeat(6, 1).T.contiguous()
        logits[:, 4] = probability.log()
        return logits.expand(len(ids), -1, -1)


class RecordingModel(StubModel):
    """Uniform model that records the ids it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[list[int]] = []

    def hidden_states(self, ids: Tensor) -> Tensor:
        self.read += ids.tolist()
        return torch.zeros(*ids.shape, 6)


class TestHandComputedValues:
    def test_two_documents_with_known_probabilities(
        self, unigram: TokenFormer, tokenizer: Tokenizer
    ) -> None:
        # `abab a`: ab ab ␣ a = 1 + 1 + 3 + 2 = 7 bits of 6 bytes and 2 words.
        # `é a`:    é ␣ a     = 5 + 3 + 2     = 10 bits of 4 bytes and 2 words.
        result = measure_perplexity(["abab a", "é a"], tokenizer, Scorer(unigram))
        counts = result.documents, result.tokens, result.bytes, result.words
        assert counts == (2, 7, 10, 4)
        assert result.nats == pytest.approx(17 * math.log(2), rel=1e-12)
        assert result.loss == pytest.approx(17 / 7 * math.log(2), rel=1e-12)
        assert result.token_perplexity == pytest.approx(2 ** (17 / 7), rel=1e-12)
        assert result.bits_per_byte == pytest.approx(1.7, rel=1e-12)
        assert result.byte_perplexity == pytest.approx(2**1.7, rel=1e-12)
        assert result.word_perplexity == pytest.approx(2 ** (17 / 4), rel=1e-12)

    @pytest.mark.parametrize(
        ("stride", "bits"),
        [
            # Seven times `a` in windows of 4: the number of tokens read before each `a`.
            (4, (1 + 2 + 3 + 4) + (2 + 3 + 4)),
            (3, (1 + 2 + 3 + 4) + (2 + 3 + 4)),
            (2, (1 + 2 + 3 + 4) + (3 + 4) + 4),
            (1, (1 + 2 + 3 + 4) + 4 + 4 + 4),
        ],
    )
    def test_stride_determines_context_of_each_token(
        self, tokenizer: Tokenizer, stride: int, bits: int
    ) -> None:
        result = measure_perplexity(["aaaaaaa"], tokenizer, Scorer(PositionModel()), stride)
        assert result.nats == pytest.approx(bits * math.log(2), rel=1e-12)

    def test_documents_start_with_end_of_text(self, tokenizer: Tokenizer) -> None:
        model = RecordingModel()
        measure_perplexity(["aabbb", "b b"], tokenizer, Scorer(model, batch_size=1))
        assert model.read == [[0, 4, 5, 2], [0, 2, 3]], "a ab b(b); b ␣ (b)"

    def test_uniform_model_has_perplexity_of_vocabulary_size(
        self, unigram: TokenFormer, tokenizer: Tokenizer
    ) -> None:
        nn.init.zeros_(unigram.embedding.weight)
        result = measure_perplexity(["abab é", "ba"], tokenizer, Scorer(unigram))
        assert result.token_perplexity == pytest.approx(6, rel=1e-12)


@pytest.fixture
def texts(corpus: TextCorpus) -> list[str]:
    """Three documents: longer than a window, shorter than a window, and one letter."""
    first, second, _ = corpus.documents("validation")
    return [first[:600], second[:20], "é"]


def test_nats_equal_those_of_one_forward_pass_per_token(
    published_model: TokenFormer, store: TokenStore, texts: list[str]
) -> None:
    tokenizer, model, context_length = store.tokenizer(), published_model.double(), 32
    for stride in (1, 7, 32):
        nats = 0.0
        for text in texts:
            ids = [tokenizer.end_of_text, *tokenizer.encode(text)]
            for position in range(1, len(ids)):
                after_first = max(0, position - context_length)  # tokens after the first window
                end = context_length + math.ceil(after_first / stride) * stride
                start = max(0, min(end, len(ids) - 1) - context_length) if after_first else 0
                with torch.no_grad():
                    logits = model(torch.tensor([ids[start:position]]))[0, -1]
                nats -= logits.log_softmax(-1)[ids[position]].item()
        result = measure_perplexity(texts, tokenizer, Scorer(model), stride)
        assert result.nats == pytest.approx(nats, rel=1e-12)


def test_result_does_not_depend_on_batch_size(
    published_model: TokenFormer, store: TokenStore, texts: list[str]
) -> None:
    single, batched = (
        measure_perplexity(texts, store.tokenizer(), Scorer(published_model.double(), size), 20)
        for size in (1, 16)
    )
    assert single.nats == pytest.approx(batched.nats, rel=1e-12)
    assert single.tokens == batched.tokens


def test_result_does_not_depend_on_chunk_size(
    published_model: TokenFormer,
    store: TokenStore,
    texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scorer = Scorer(published_model.double())
    one_chunk = measure_perplexity(texts, store.tokenizer(), scorer)
    monkeypatch.setattr(perplexity, "TOKENS_PER_CHUNK", 40)
    monkeypatch.setattr(perplexity, "CHARACTERS_PER_BATCH", 10)
    many_chunks = measure_perplexity(texts, store.tokenizer(), scorer)
    assert many_chunks.nats == pytest.approx(one_chunk.nats, rel=1e-12)
    assert many_chunks.tokens == one_chunk.tokens


def test_spans_of_token_stream_equal_validation_of_training(
    published_model: TokenFormer, store: TokenStore
) -> None:
    sequences = store.sequences("validation", 32)
    stream = sequences.tokens.read(0, len(sequences) * 32 + 1)
    spans = [*rolling_spans(len(stream) - 1, 32, 32)]
    rows = torch.stack([torch.from_numpy(stream[span.start : span.last + 1]) for span in spans])
    batch = torch.stack([*sequences])
    assert torch.equal(rows, batch)
    windows = [Window(row[:1], row[1:]) for row in rows.tolist()]
    scores = Scorer(published_model).score(windows)
    with torch.no_grad():
        loss = published_model(batch[:, :-1], targets=batch[:, 1:]).item()
    nats = sum(score.log_likelihood for score in scores)
    assert -nats / (len(stream) - 1) == pytest.approx(loss, rel=1e-6)


class TestAgreementWithHarness:
    @pytest.mark.parametrize(
        "text", ["two words", " and\u2003more \n", "one", "\n", "a\x1cb\u200bc", "Zoë’s naïve café"]
    )
    def test_words_and_bytes_have_same_counts(self, tokenizer: Tokenizer, text: str) -> None:
        assert count_words(text) == ConfigurableTask.count_words(text)
        assert len(text.encode()) == ConfigurableTask.count_bytes(text)

    def test_metrics_of_same_documents_agree(
        self, published_model: TokenFormer, store: TokenStore, texts: list[str]
    ) -> None:
        tokenizer, scorer = store.tokenizer(), Scorer(published_model.double())
        likelihoods = []
        for text in texts:
            rolling = get_rolling_token_windows(
                tokenizer.encode(text), tokenizer.end_of_text, 32, context_len=1
            )
            windows = [Window(*make_disjoint_window(each)) for each in rolling]
            likelihoods.append(sum(score.log_likelihood for score in scorer.score(windows)))
        words = [*zip(likelihoods, map(ConfigurableTask.count_words, texts), strict=True)]
        sizes = [*zip(likelihoods, map(ConfigurableTask.count_bytes, texts), strict=True)]
        result = measure_perplexity(texts, tokenizer, scorer)
        assert result.word_perplexity == pytest.approx(weighted_perplexity(words), rel=1e-11)
        assert result.byte_perplexity == pytest.approx(weighted_perplexity(sizes), rel=1e-11)
        assert result.bits_per_byte == pytest.approx(bits_per_byte(sizes), rel=1e-11)


class InMemoryText:
    """Text with both splits in memory."""

    def __init__(self, train: list[str], validation: list[str]) -> None:
        self.splits = {"train": train, "validation": validation}

    def documents(self, split: Split) -> Iterator[str]:
        return iter(self.splits[split])

    def identity(self) -> dict[str, Any]:
        return {}


TEXT = InMemoryText(train=["one", "two"], validation=["drei", "vïer", "fünf"])


class TestSelectDocuments:
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
    def test_split_and_max_bytes_select_documents(
        self, settings: dict[str, Any], expected: list[str]
    ) -> None:
        config = parse_dataclass(PerplexityConfig, settings, "perplexity")
        assert [*select_documents(TEXT, config)] == expected

    def test_limit_is_number_of_documents(self) -> None:
        assert [*select_documents(TEXT, PerplexityConfig(split="all"), 3)] == ["one", "two", "drei"]

    def test_split_without_documents_is_refused(self) -> None:
        with pytest.raises(UserError, match=r"validation split, got none.* perplexity\.split=all"):
            select_documents(InMemoryText(["one"], []), PerplexityConfig())
        with pytest.raises(UserError, match=r"at least one document, got none\. Check data"):
            select_documents(InMemoryText([], []), PerplexityConfig(split="all"))


class TestErrors:
    @pytest.mark.parametrize("settings", [{"stride": 0}, {"max_bytes": 0}, {"split": "test"}])
    def test_setting_out_of_range_is_refused(self, settings: dict[str, Any]) -> None:
        (key,) = settings
        with pytest.raises(UserError, match=rf"perplexity\.{key} must be"):
            parse_dataclass(PerplexityConfig, settings, "perplexity")

    def test_stride_above_context_length_is_refused(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(UserError, match=r"perplexity\.stride must be at most 4, .* got 5"):
            measure_perplexity(["a"], tokenizer, Scorer(RecordingModel()), stride=5)

    def test_text_without_tokens_is_refused(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(UserError, match="data must have at least one token, got none"):
            measure_perplexity(["?"], tokenizer, Scorer(RecordingModel()))


class TestOutput:
    result = Perplexity(
        documents=2,
        bytes=10,
        words=4,
        text_sha256="8bb3c4",
        tokens=7,
        nats=17 * math.log(2),
        context_length=4,
        stride=4,
    )

    def test_table_shows_ratios(self) -> None:
        console = Console(width=80, record=True, file=StringIO())
        console.print(perplexity_table(self.result))
        lines = [line.split() for line in console.export_text().splitlines() if line.strip()]
        values = {" ".join(words[:-1]): words[-1] for words in lines[3:]}
        assert values == {
            "loss (nats per token)": "1.68336",  # 17 / 7 ln 2
            "token perplexity": "5.3836",  # 2 to the power of 17 / 7
            "bits per byte": "1.70000",
            "word perplexity": "19.0273",
        }

    def test_text_hash_covers_document_boundaries(
        self, unigram: TokenFormer, tokenizer: Tokenizer
    ) -> None:
        def text_hash(*texts: str) -> str:
            return measure_perplexity(texts, tokenizer, Scorer(unigram)).text_sha256

        # Each document follows its length in bytes.
        assert text_hash("abab a", "é a") == hashlib.sha256("6\nabab a4\né a".encode()).hexdigest()
        assert text_hash("ab", "a") != text_hash("a", "ab") != text_hash("aba")

    def test_caption_has_counts_and_windows(self) -> None:
        assert perplexity_caption(self.result) == (
            "2 documents: 10 bytes, 4 words, 7 tokens\nwindows of 4 tokens, 4 of them new"
        )

    def test_infinite_perplexity_is_null_in_json(self) -> None:
        values = replace(self.result, nats=2900.0).to_dict()
        assert values["nats"] == 2900.0
        assert values["word_perplexity"] is None, "e to the power of 725"
        assert values["byte_perplexity"] == pytest.approx(math.exp(290))

    @pytest.mark.parametrize("nats", [17.25, math.nan])
    def test_json_round_trip_preserves_result(self, nats: float) -> None:
        result = replace(self.result, nats=nats)
        loaded = Perplexity.from_dict(json.loads(json.dumps(result.to_dict())))
        assert repr(loaded) == repr(result)

    def test_last_progress_line_has_final_perplexity(
        self, unigram: TokenFormer, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        texts = ["abab a", "é a"]
        scorer, console = Scorer(unigram, batch_size=1), Console(stderr=True)
        measure_perplexity(texts, tokenizer, scorer, console=console)
        assert "perplexity 5.3836, 7 tokens, " in capsys.readouterr().err
