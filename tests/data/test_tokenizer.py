"""Tests of tokenizers: BPE training, lossless round trips, and the end of a document."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from tokengrow.data.corpus import TextCorpus
from tokengrow.data.tokenizer import (
    Tokenizer,
    TokenizerConfig,
    prepare_tokenizer,
    train_tokenizer,
)
from tokengrow.errors import UserError

TEXT = "the quick brown fox jumps over the lazy dog; the end.\n" * 20


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TextCorpus:
    file = tmp_path_factory.mktemp("text") / "fox.txt"
    file.write_text(TEXT)
    return TextCorpus(files=[str(file)], validation_fraction=0)


@pytest.fixture(scope="module")
def tokenizer(corpus: TextCorpus) -> Tokenizer:
    return train_tokenizer(TokenizerConfig(vocab_size=280), corpus)


def test_vocabulary_is_end_of_text_bytes_and_merges(tokenizer: Tokenizer) -> None:
    assert tokenizer.end_of_text == 0
    assert tokenizer.vocab_size == 280
    assert len(tokenizer.encode(TEXT)) < len(TEXT) / 2


def test_round_trip_is_lossless(tokenizer: Tokenizer) -> None:
    @given(st.text())
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.end_of_text not in ids

    check()


def test_literal_end_of_text_is_ordinary_text(tokenizer: Tokenizer) -> None:
    text = "before <|endoftext|> after"
    ids = tokenizer.encode(text)
    assert tokenizer.end_of_text not in ids and tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.end_of_text]) == "<|endoftext|>"


def test_batch_encodes_each_text(tokenizer: Tokenizer) -> None:
    texts = ["the fox", "", "a dog"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_training_is_deterministic(corpus: TextCorpus, tokenizer: Tokenizer) -> None:
    again = train_tokenizer(TokenizerConfig(vocab_size=280), corpus)
    assert again.to_json() == tokenizer.to_json()


def test_saved_tokenizer_loads_unchanged(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode("the <|endoftext|>") == tokenizer.encode("the <|endoftext|>")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_json_round_trip_is_lossless(tokenizer: Tokenizer) -> None:
    assert Tokenizer.from_json(tokenizer.to_json()).fingerprint == tokenizer.fingerprint


def test_decoder_returns_character_with_its_last_id(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é✓!")
    assert len(ids) == 6  # bytes, because the corpus has neither letter
    assert list(map(tokenizer.decoder(), ids)) == ["", "é", "", "", "✓", "!"]
    assert list(map(tokenizer.decoder(), ids[:4])) == ["", "é", "", ""]


def test_decoder_output_concatenates_to_text(tokenizer: Tokenizer) -> None:
    assert "".join(map(tokenizer.decoder(), tokenizer.encode(TEXT))) == TEXT


def test_invalid_bytes_decode_to_replacement_character(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("é")[:1], *tokenizer.encode("!")]
    assert "".join(map(tokenizer.decoder(), ids)) == tokenizer.decode(ids) == "\ufffd!"


def test_decoder_prefix_keeps_leading_space() -> None:
    inner = tokenizers.Tokenizer(models.WordLevel({"<|endoftext|>": 0, "▁a": 1, "▁b": 2}, "▁a"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    metaspace = Tokenizer(inner)
    assert metaspace.encode("a b b") == [1, 2, 2]
    assert "".join(map(metaspace.decoder(), [2, 2])) == "b b"
    assert "".join(map(metaspace.decoder(prefix=[1]), [2, 2])) == " b b"


def test_truncation_and_padding_in_file_are_ignored(tokenizer: Tokenizer, tmp_path: Path) -> None:
    values = json.loads(tokenizer.to_json())
    values["truncation"] = {
        "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    (tmp_path / "truncating.json").write_text(json.dumps(values))
    loaded = Tokenizer.from_file(tmp_path / "truncating.json")
    assert loaded.decode(loaded.encode(TEXT)) == TEXT


def test_vocab_size_covers_largest_id(tokenizer: Tokenizer, tmp_path: Path) -> None:
    values = json.loads(tokenizer.to_json())
    values["model"]["vocab"]["unreachable"] = 999  # a gap before it
    (tmp_path / "gap.json").write_text(json.dumps(values))
    assert Tokenizer.from_file(tmp_path / "gap.json").vocab_size == 1000


def test_training_reads_at_most_train_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("é" * 50 + "z" * 1000)
    corpus = TextCorpus(files=[str(tmp_path / "a.txt")], validation_fraction=0)
    short = train_tokenizer(TokenizerConfig(vocab_size=400, train_bytes=101), corpus)
    assert "zz" not in json.loads(short.to_json())["model"]["vocab"]


def test_prepared_tokenizer_is_trained_once(
    corpus: TextCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TokenizerConfig(vocab_size=270)
    first = prepare_tokenizer(config, corpus, tmp_path)
    monkeypatch.setattr(
        "tokengrow.data.tokenizer.train_tokenizer", None
    )  # a second call would fail
    assert prepare_tokenizer(config, corpus, tmp_path).fingerprint == first.fingerprint
    (cached,) = (tmp_path / "tokenizers").iterdir()

    from_file = prepare_tokenizer(TokenizerConfig(file=str(cached)), corpus, tmp_path / "unused")
    assert from_file.fingerprint == first.fingerprint
    assert not (tmp_path / "unused").exists()


def test_changed_corpus_or_config_gets_new_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    corpus = TextCorpus(files=[str(file)], validation_fraction=0)
    for text, vocab_size in (("abab", 257), ("abab", 258), ("longer text", 258)):
        file.write_text(text)
        prepare_tokenizer(TokenizerConfig(vocab_size=vocab_size), corpus, tmp_path)
    assert len(list((tmp_path / "tokenizers").iterdir())) == 3


def test_invalid_input_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"tokenizer.vocab_size must be at least 257, .*, got 256\."
    ):
        TokenizerConfig(vocab_size=256)
    with pytest.raises(
        UserError, match=r"tokenizer.file must be .*absent.json, which does not exist"
    ):
        Tokenizer.from_file(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.file must be .*bad.json, which cannot be read"):
        Tokenizer.from_file(tmp_path / "bad.json")
    tokenizer.save(tmp_path / "good.json")
    with pytest.raises(
        UserError, match=r"tokenizer.end_of_text must be in .* got '</s>'.*good.json"
    ):
        Tokenizer.from_file(tmp_path / "good.json", "</s>")


def test_empty_corpus_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    corpus = TextCorpus(files=[str(tmp_path / "a.txt")])
    with pytest.raises(UserError, match=r"data must have text in its train split .*, got no text"):
        prepare_tokenizer(TokenizerConfig(), corpus, tmp_path)
