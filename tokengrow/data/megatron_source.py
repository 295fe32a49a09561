"""Megatron's token files as the source of a run, in the published order of samples."""

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
from tokengrow.data.sequences import Sequences, check_length
from tokengrow.data.tokenizer import Tokenizer
from tokengrow.errors import UserError


@dataclass(frozen=True, kw_only=True)
class MegatronConfig:
    """Which token files, and which of their documents."""

    prefix: str
    """Path of the .bin and .idx file, without these endings."""
    validation_prefix: str | None = None
    """The same for validation: nothing of `prefix` is held out then."""
    split: str = "969, 30, 1"
    """Shares of train, validation and test among the documents, in their order in the file."""
    epochs: int | None = None
    """How often the shuffled row holds each document; null: as often as the run needs."""

    def __post_init__(self) -> None:
        if self.epochs is not None and self.epochs < 1:
            raise UserError(f"data.epochs is {self.epochs}: give at least 1, or null")
        try:
            split_documents(self.split, 1000)
        except ValueError as error:
            raise UserError(
                f"data.split {self.split!r}: {error}, as in '969, 30, 1' (train, validation, test)"
            ) from None


class MegatronSamples(Sequences):
    """The samples of the train split in the published order, int64 [T + 1].

    Global batch n holds the samples from n times its size on. Behind the last one the order begins
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
        # Python integers: places in the file soon pass what the arrays' int32 can count.
        (place, token), (last, last_token) = self.order.sample_idx[sample : sample + 2].tolist()
        documents = self.order.doc_idx[place : last + 1].tolist()
        stops = [int(self.files.sizes[document]) for document in documents[:-1]]
        pieces = []
        for document, stop in zip(documents, [*stops, last_token + 1], strict=True):
            pieces.append(self.tokens.read(self.files.start(document) + token, stop - token))
            token = 0
        return torch.from_numpy(np.concatenate(pieces))

    def batch(self, number: int, size: int, seed: int) -> np.ndarray:
        """The samples of global batch ``number``, int64 [size]; `seed` has shuffled them before."""
        return np.arange(number * size, (number + 1) * size, dtype=np.int64) % len(self)


@dataclass(frozen=True)
class Part:
    """The documents of one split."""

    files: IndexedTokens
    """That hold them."""
    first: int
    """Number of the first one."""
    stop: int
    """Number behind the last one."""

    def __len__(self) -> int:
        return self.files.start(self.stop) - self.files.start(self.first)


@dataclass(frozen=True)
class MegatronSource:
    """A `TokenSource` over token files; made by `open`."""

    parts: dict[Split, Part]
    """Train and validation."""
    inner: Tokenizer
    """That made them."""
    epochs: int
    """How often the shuffled row holds each document of train."""
    seed: int
    """Of the shuffles."""
    cache: Path
    """Folder in which the order is kept."""

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
        """Opens the files and fixes the number of epochs.

        Args:
            config: which files.
            tokenizer: that made them.
            samples: sequences that the whole run trains on.
            context_length: T, the longest of the run.
            seed: of the order.
            cache: folder in which the order is kept.

        Raises:
            UserError: files that are missing, malformed, or too short for one sample.
        """
        parts = _parts(config)
        tokens = len(parts["train"])
        check_length(tokens, context_length, "train")
        epochs = config.epochs or num_epochs(tokens, context_length, samples)
        return cls(parts, tokenizer, epochs, seed, cache)

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id that can occur."""
        return self.inner.vocab_size

    @property
    def fingerprint(self) -> str:
        """Files, documents, epochs and tokenizer in hex; the seed is the run's own."""
        splits = {
            name: [part.files.fingerprint, part.first, part.stop]
            for name, part in self.parts.items()
        }
        content = json.dumps([splits, self.epochs, self.inner.fingerprint], sort_keys=True)
        return sha256(content.encode()).hexdigest()

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens."""
        return self.inner

    def sequences(self, name: Split, context_length: int) -> Sequences:
        """Train: samples in the published order. Validation: the documents as they lie.

        Raises:
            UserError: the split is shorter than one sequence.
        """
        part = self.parts[name]
        check_length(len(part), context_length, name, WAY_OUT)
        if name == "validation":
            tokens = part.files.tokens(part.first, part.stop, self.vocab_size)
            return Sequences(tokens, context_length)
        key = OrderKey(
            content=part.files.fingerprint,
            first=part.first,
            stop=part.stop,
            epochs=self.epochs,
            context_length=context_length,
            seed=self.seed,
        )
        order = prepare_order(part.files.sizes, key, self.cache)
        return MegatronSamples(part.files, order, context_length, self.vocab_size)


WAY_OUT = "raise the second share of data.split, give data.validation_prefix"


def _parts(config: MegatronConfig) -> dict[Split, Part]:
    """The documents of each split."""
    files = IndexedTokens.open(config.prefix)
    if config.validation_prefix:
        apart = IndexedTokens.open(config.validation_prefix)
        return {"train": Part(files, 0, len(files)), "validation": Part(apart, 0, len(apart))}
    _, first, second, _ = split_documents(config.split, len(files))
    return {"train": Part(files, 0, first), "validation": Part(files, first, second)}
