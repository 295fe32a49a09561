"""Tokenizers: a byte-level BPE trained on a corpus, or any `tokenizers` JSON file."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tokengrow.data.corpus import Text, first_bytes
from tokengrow.errors import UserError
from tokengrow.files import directory_lock, write_atomically

END_OF_TEXT = "<|endoftext|>"
MAX_CHARACTER_BYTES = 4
"""Maximum bytes of a character in UTF-8, and so the maximum number of its token ids."""
_NUM_BYTES = 256


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Tokenizer file, or settings of the tokenizer to train."""

    file: str | None = None
    """A `tokenizers` JSON file to use; null: train a byte-level BPE on the corpus."""
    vocab_size: int = 4096
    """Number of entries of the trained vocabulary, at least 257; ignored with `file`."""
    end_of_text: str = END_OF_TEXT
    """Token that ends every document."""
    train_bytes: int = 20_000_000
    """Bytes from the start of the corpus to train the BPE on; ignored with `file`."""

    def __post_init__(self) -> None:
        if self.file is None and self.vocab_size <= _NUM_BYTES:
            raise UserError(
                f"tokenizer.vocab_size must be at least {_NUM_BYTES + 1}, one entry for each byte "
                f"and one for the end of text, got {self.vocab_size}."
            )
        if self.file is None and self.train_bytes < 1:
            raise UserError(f"tokenizer.train_bytes must be at least 1, got {self.train_bytes}.")


class Tokenizer:
    """A `tokenizers.Tokenizer` with a fixed end-of-document token.

    Attributes:
        vocab_size: largest token id, including added tokens, plus one.
        end_of_text: id of the token that ends a document.
        end_of_text_token: text of that token.
        fingerprint: SHA-256 of the JSON form, in hex.
    """

    def __init__(self, inner: tokenizers.Tokenizer, end_of_text: str = END_OF_TEXT) -> None:
        end_of_text_id = inner.token_to_id(end_of_text)
        if end_of_text_id is None:
            raise UserError(
                f"tokenizer.end_of_text must be in the vocabulary, got {end_of_text!r}. Name the "
                "token that ends a document."
            )
        # A file may enable truncation or padding, which would corrupt a stream of documents.
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True  # the literal text <|endoftext|> ends no document
        self._inner = inner
        self.end_of_text: int = end_of_text_id
        self.end_of_text_token = end_of_text
        self.vocab_size: int = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def from_file(cls, path: str | Path, end_of_text: str = END_OF_TEXT) -> "Tokenizer":
        """Read a `tokenizers` JSON file.

        Raises:
            UserError: the file is missing or malformed, or has no token `end_of_text`.
        """
        if not Path(path).expanduser().is_file():
            raise UserError(
                f"tokenizer.file must be a tokenizers JSON file, got {path}, which does not exist."
            )
        try:
            inner = tokenizers.Tokenizer.from_file(str(Path(path).expanduser()))
        except Exception as error:  # the library raises plain Exception
            raise UserError(
                f"tokenizer.file must be a tokenizers JSON file, got {path}, which cannot be read: "
                f"{error}."
            ) from error
        try:
            return cls(inner, end_of_text)
        except UserError as error:
            raise UserError(f"{error} (The file is {path}.)") from None

    @classmethod
    def from_json(cls, text: str, end_of_text: str = END_OF_TEXT) -> "Tokenizer":
        """Build a tokenizer from the output of `to_json`."""
        return cls(tokenizers.Tokenizer.from_str(text), end_of_text)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text; no special token is added or recognised."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text, computed on all cores.

        The environment variable TOKENIZERS_PARALLELISM can disable the parallelism.
        """
        # The fast variant omits the offsets, which are not needed here. It is 1.7 times as fast.
        encodings = self._inner.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, with special tokens as literal text."""
        return self._inner.decode(ids, skip_special_tokens=False)

    def decoder(self, prefix: Sequence[int] = ()) -> Callable[[int], str]:
        """Return a streaming decoder: a function from the next token id to the text it adds.

        A character of several ids is returned with the last of them. A character that is cut off is
        therefore never returned.

        Args:
            prefix: ids before the text; in some tokenizers they decide about a leading space.
        """
        stream = decoders.DecodeStream(skip_special_tokens=False)
        for token in prefix[-MAX_CHARACTER_BYTES:]:
            stream.step(self._inner, token)
        return lambda token: stream.step(self._inner, token) or ""

    def to_json(self) -> str:
        """Return the `tokenizers` JSON form, on one line."""
        return self._inner.to_str()

    def save(self, path: str | Path) -> None:
        """Write the JSON form, atomically."""
        write_atomically(Path(path), self.to_json().encode())


def prepare_tokenizer(config: TokenizerConfig, corpus: Text, cache: Path) -> Tokenizer:
    """Load `config.file`, or train on the train split unless the result is in the cache.

    Args:
        config: the tokenizer.
        corpus: text to train on.
        cache: folder of `tokenizers/KEY.json`; the key is a hash of config and corpus.

    Raises:
        UserError: the file cannot be used, or the train split is empty.
    """
    if config.file is not None:
        return Tokenizer.from_file(config.file, config.end_of_text)
    key = sha256(json.dumps([asdict(config), corpus.identity()]).encode()).hexdigest()[:16]
    path = cache / "tokenizers" / f"{key}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with directory_lock(path.parent):  # one process trains it, the others wait
            if not path.is_file():
                train_tokenizer(config, corpus).save(path)
    return Tokenizer.from_file(path, config.end_of_text)


def train_tokenizer(config: TokenizerConfig, corpus: Text) -> Tokenizer:
    """Train a byte-level BPE, which is lossless for every text; training is deterministic.

    Raises:
        UserError: the train split is empty.
    """
    texts = list(first_bytes(corpus.documents("train"), config.train_bytes))
    if not texts:
        raise UserError(
            "data must have text in its train split to train a tokenizer on, got no text. Check "
            "the files and data.validation_fraction."
        )
    inner = tokenizers.Tokenizer(models.BPE())
    # No space is added before the first word, so that decode(encode(text)) equals the text.
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[config.end_of_text],  # special tokens come first, so its id is 0
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return Tokenizer(inner, config.end_of_text)
