"""Megatron token files as the source of a run, in the published order of samples."""

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch

from tokengrow.data.corpus import Split
from tokengrow.data.megatron import IndexedTokens
from tokengrow.data.megatron_order import (
    OrderKey,
    SampleOrder,
    num_epochs,
    prepare_order,
    split_documents,
)
from tokengrow.data.sequences import Sequences, check_split_length
from tokengrow.data.tokenizer import Tokenizer
from tokengrow.errors import UserError

REMEDY = "raise the second share of data.split, or give data.validation_prefix"
"""Way to get a longer validation split."""


@dataclass(frozen=True, kw_only=True)
class MegatronConfig:
    """Token files, and the division of their documents into splits."""

    prefix: str
    """Path of the .bin and .idx file, without these extensions."""
    validation_prefix: str | None = None
    """Path of the validation files; if given, no document of `prefix` is held out."""
    split: str = "969, 30, 1"
    """Shares of train, validation and test among the documents, in their order in the file."""
    epochs: int | None = None
    """Number of times that the shuffled row holds each document; null: as the run requires."""

    def __post_init__(self) -> None:
        if self.epochs is not None and self.epochs < 1:
            raise UserError(f"data.epochs must be at least 1 or null, got {self.epochs}.")
        try:
            split_documents(self.split, 1000)
        except ValueError as error:
            raise UserError(
                "data.split must be the shares of train, validation and test, for example "
                f"'969, 30, 1', got {self.split!r}: {error}."
            ) from None


class MegatronSamples(Sequences):
    """Samples of the train split in the published order, int64 [T + 1].

    Global batch n holds the samples from `n * batch_size`. After the last sample the order starts
    again.
    """

    def __init__(
        self, files: IndexedTokens, order: SampleOrder, context_length: int, vocab_size: int
    ) -> None:
        super().__init__(files.tokens(0, len(files), vocab_size), context_length)
        self.files, self.order = files, order

    def __len__(self) -> int:
        return len(self.order.shuffle_idx)

    def __getitem__(self, index: int) -> torch.Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        sample = int(self.order.shuffle_idx[index])
        # Python integers, because token offsets can exceed the int32 of the arrays.
        (first, token), (last, last_token) = self.order.sample_idx[sample : sample + 2].tolist()
        documents = self.order.doc_idx[first : last + 1].tolist()
        stops = [int(self.files.sizes[document]) for document in documents[:-1]]
        pieces = []
        for document, stop in zip(documents, [*stops, last_token + 1], strict=True):
            offset = self.files.token_offset(document)
            pieces.append(self.tokens.read(offset + token, stop - token))
            token = 0
        return torch.from_numpy(np.concatenate(pieces))

    def batch_indices(self, number: int, size: int, seed: int) -> np.ndarray:
        """Return the samples of global batch `number`, int64 [size].

        `seed` is not used: the order is shuffled already.
        """
        return np.arange(number * size, (number + 1) * size, dtype=np.int64) % len(self)


@dataclass(frozen=True)
class DocumentRange:
    """Consecutive documents of token files: one split."""

    files: IndexedTokens
    """Files that hold the documents."""
    first: int
    """Number of the first document."""
    stop: int
    """Number of the last document plus one."""

    def __len__(self) -> int:
        return self.files.token_offset(self.stop) - self.files.token_offset(self.first)


@dataclass(frozen=True)
class MegatronSource:
    """A `TokenSource` of token files, made by `open`."""

    splits: dict[Split, DocumentRange]
    """Documents of train and validation."""
    data_tokenizer: Tokenizer
    """Tokenizer that made the token ids."""
    epochs: int
    """Number of times that the shuffled row holds each training document."""
    seed: int
    """Seed of the shuffles."""
    cache: Path
    """Folder in which the order is cached."""

    @classmethod
    def open(
        cls,
        config: MegatronConfig,
        tokenizer: Tokenizer,
        *,
        samples: int,
        context_length: int,
        seed: int,
        cache: Path,
    ) -> "MegatronSource":
        """Open the files and compute the number of epochs.

        Args:
            config: the files.
            tokenizer: tokenizer that made them.
            samples: sequences that the complete run trains on.
            context_length: largest context length T of the run.
            seed: seed of the order.
            cache: folder in which the order is cached.

        Raises:
            UserError: files are missing, malformed, or too short for one sample.
        """
        files = IndexedTokens.open(config.prefix)
        splits: dict[Split, DocumentRange]
        if config.validation_prefix:
            validation = IndexedTokens.open(config.validation_prefix)
            splits = {
                "train": DocumentRange(files, 0, len(files)),
                "validation": DocumentRange(validation, 0, len(validation)),
            }
        else:
            _, train_stop, validation_stop, _ = split_documents(config.split, len(files))
            splits = {
                "train": DocumentRange(files, 0, train_stop),
                "validation": DocumentRange(files, train_stop, validation_stop),
            }
        tokens = len(splits["train"])
        check_split_length(tokens, context_length, "train")
        epochs = config.epochs or num_epochs(tokens, context_length, samples)
        return cls(splits, tokenizer, epochs, seed, cache)

    @property
    def vocab_size(self) -> int:
        """Largest token id that can occur, plus one."""
        return self.data_tokenizer.vocab_size

    @property
    def fingerprint(self) -> str:
        """SHA-256 of files, documents, epochs and tokenizer in hex, without the seed."""
        splits = {
            name: [documents.files.fingerprint, documents.first, documents.stop]
            for name, documents in self.splits.items()
        }
        content = json.dumps([splits, self.epochs, self.data_tokenizer.fingerprint], sort_keys=True)
        return sha256(content.encode()).hexdigest()

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that made the tokens."""
        return self.data_tokenizer

    def sequences(self, name: Split, context_length: int) -> Sequences:
        """Return the samples of train in the published order, or validation in file order.

        Raises:
            UserError: the split is shorter than one sequence.
        """
        documents = self.splits[name]
        check_split_length(len(documents), context_length, name, REMEDY)
        if name == "validation":
            tokens = documents.files.tokens(documents.first, documents.stop, self.vocab_size)
            return Sequences(tokens, context_length)
        key = OrderKey(
            content=documents.files.fingerprint,
            first=documents.first,
            stop=documents.stop,
            epochs=self.epochs,
            context_length=context_length,
            seed=self.seed,
        )
        order = prepare_order(documents.files.sizes, key, self.cache)
        return MegatronSamples(documents.files, order, context_length, self.vocab_size)
