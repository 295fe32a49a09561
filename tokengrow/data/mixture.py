"""Mixtures: several token stores of one tokenizer, in fixed shares.

The folder of a mixture, as `tokengrow data` writes it, holds one store per source, under the name
of the source. `mixture.json`, written last, holds the weights and the paths of the stores.
"""

import json
import math
import re
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokengrow.data.corpus import Corpus, Split
from tokengrow.data.order import BLOCK_SIZE, apportion, mixed_batch_indices
from tokengrow.data.sequences import Sequences, TokenSource
from tokengrow.data.store import TokenStore, build_store, prepare_store
from tokengrow.data.tokenizer import Tokenizer
from tokengrow.errors import UserError
from tokengrow.files import write_atomically

MIXTURE = "mixture.json"
"""File that marks the folder of a mixture."""
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class MixedSource:
    """One source of a mixture: a text, or a token store."""

    weight: float = 1.0
    """Share of the training sequences, relative to the sum of all weights."""
    corpus: Corpus | None = None
    """The text; None: the source is a token store."""
    store: str | None = None
    """Folder of the token store."""


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """Sources of a mixture and their shares."""

    sources: dict[str, MixedSource]
    """Name (letters, digits, `-`, `_` and `.`) to source."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError(
                "data.sources must have at least one source, got none. Name a source and its "
                "weight."
            )
        for name, source in self.sources.items():
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise UserError(
                    f"data.sources must have names of letters, digits, -, _ and ., got {name!r}."
                )
            if not 0 < source.weight < math.inf:
                raise UserError(
                    f"data.sources.{name}.weight must be greater than 0, got {source.weight:g}."
                )
        for name, quota in zip(self.names, self.quotas, strict=True):
            if not quota:
                raise UserError(
                    f"data.sources.{name}.weight must give at least half a sequence in "
                    f"{BLOCK_SIZE:,}, got {self.sources[name].weight:g}. Raise it, or leave out "
                    "the source."
                )

    @property
    def names(self) -> list[str]:
        """Sorted names, so that the order of the sources in the config has no effect."""
        return sorted(self.sources)

    @property
    def quotas(self) -> tuple[int, ...]:
        """Sequences of each name in a block of `BLOCK_SIZE`."""
        return apportion(BLOCK_SIZE, [self.sources[name].weight for name in self.names])

    @property
    def text(self) -> "MixtureText":
        """Text to train a tokenizer on."""
        pairs = ((name, self.sources[name].corpus) for name in self.names)
        return MixtureText({name: corpus for name, corpus in pairs if corpus})

    def stored_tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer of the first source that is a token store, or None."""
        for name in self.names:
            if folder := self.sources[name].store:
                with _prefix_errors(name):
                    return TokenStore.open(Path(folder)).tokenizer()
        return None


@dataclass(frozen=True)
class MixtureText:
    """Interleaved text of several sources, in equal shares of characters.

    Weights have no effect: otherwise other weights would give another tokenizer, and all sources
    would have to be tokenised again.
    """

    corpora: dict[str, Corpus]
    """Name to corpus, sorted by name."""

    def documents(self, split: Split) -> Iterator[str]:
        """Yield documents, each from the source with the fewest characters so far."""
        iterators = {name: corpus.documents(split) for name, corpus in self.corpora.items()}
        characters = dict.fromkeys(iterators, 0)
        while iterators:
            name = min(iterators, key=characters.__getitem__)
            with _prefix_errors(name):
                text = next(iterators[name], None)
            if text is None:
                del iterators[name]
            else:
                characters[name] += len(text)
                yield text

    def identity(self) -> dict[str, Any]:
        """Return everything that the text depends on, as JSON values."""
        identities = {}
        for name, corpus in self.corpora.items():
            with _prefix_errors(name):
                identities[name] = corpus.identity()
        return {"kind": "mixture", "sources": identities}


@dataclass(frozen=True)
class Mixture:
    """A `TokenSource` of several token stores."""

    stores: dict[str, TokenStore]
    """Name to store, sorted by name."""
    quotas: tuple[int, ...]
    """Sequences of each store in a block of `BLOCK_SIZE`."""

    @classmethod
    def open(cls, folder: Path) -> "Mixture":
        """Open the mixture that `build_mixture` wrote to a folder.

        Raises:
            UserError: the record is malformed, or a store is missing or damaged.
        """
        path = folder / MIXTURE
        try:
            record = json.loads(path.read_bytes())
            valid = record["format"] == _FORMAT
            sources = {
                str(name): MixedSource(weight=float(entry["weight"]), store=str(entry["store"]))
                for name, entry in record["sources"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            valid = False
        if not valid:
            raise UserError(
                f"Damaged mixture: {path} was not written by this version of tokengrow. Move the "
                f"file away, then repeat the `tokengrow data` command with out={folder}."
            )
        config = MixtureConfig(sources=sources)
        return cls.from_stores(
            config, {name: _open_source_store(config, name, folder) for name in config.names}
        )

    @classmethod
    def from_stores(cls, config: MixtureConfig, stores: dict[str, TokenStore]) -> "Mixture":
        """Mix stores in the shares of a config.

        Args:
            config: the shares.
            stores: name to store, sorted by name.

        Raises:
            UserError: the stores have different tokenizers.
        """
        first = next(iter(stores))
        for name, store in stores.items():
            if store.record.source.tokenizer != stores[first].record.source.tokenizer:
                raise UserError(
                    f"data.sources must have one tokenizer, but {name} ({store.folder}) and "
                    f"{first} ({stores[first].folder}) have different ones. Make both stores with "
                    "the same one: tokenizer=file tokenizer.file=PATH."
                )
        return cls(stores, config.quotas)

    @property
    def vocab_size(self) -> int:
        """Largest token id that can occur, plus one."""
        return max(store.vocab_size for store in self.stores.values())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, shares and content of the sources, in hex."""
        sources = {
            name: [quota, store.fingerprint]
            for (name, store), quota in zip(self.stores.items(), self.quotas, strict=True)
        }
        return sha256(json.dumps({"mixture": sources}, sort_keys=True).encode()).hexdigest()

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of all stores."""
        return next(iter(self.stores.values())).tokenizer()

    def sequences(self, name: Split, context_length: int) -> Sequences:
        """Return a split of all sources, each cut into sequences.

        Raises:
            UserError: the split of a source is shorter than one sequence.
        """
        parts = []
        for source, store in self.stores.items():
            with _prefix_errors(source):
                parts.append(store.sequences(name, context_length))
        return MixedSequences(parts, self.quotas)

    def summary_lines(self) -> Iterator[str]:
        """Yield one line per source: share, numbers of tokens and folder."""
        for (name, store), quota in zip(self.stores.items(), self.quotas, strict=True):
            yield (
                f"{name}: {quota / BLOCK_SIZE:.2%} of the sequences, from "
                f"{len(store.split('train')):,} training and {len(store.split('validation')):,} "
                f"validation tokens in {store.folder}"
            )


class MixedSequences(Sequences):
    """Concatenated sequences of all sources; batches mix them."""

    def __init__(self, parts: list[Sequences], quotas: tuple[int, ...]) -> None:
        # The base class is not initialised: there is no single stream of tokens.
        self.context_length = parts[0].context_length
        self._parts, self._quotas = parts, quotas
        self._lengths = [len(part) for part in parts]
        self._starts = [0, *accumulate(self._lengths)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> torch.Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        part = bisect_right(self._starts, index) - 1
        return self._parts[part][index - self._starts[part]]

    def batch_indices(self, number: int, size: int, seed: int) -> np.ndarray:
        """Return the sequences of global batch `number`, int64 [size].

        See `order.mixed_batch_indices`.
        """
        sources, indices = mixed_batch_indices(seed, number, size, self._quotas, self._lengths)
        mixed: np.ndarray = np.array(self._starts)[sources] + indices
        return mixed

    def evenly_spaced(self, count: int) -> np.ndarray:
        """Return sequences of each source in its share, evenly spaced over it, int64 [count].

        A source with fewer sequences than its share contributes some of them several times.
        """
        counts = apportion(count, self._quotas)
        spaced = [part.evenly_spaced(own) for part, own in zip(self._parts, counts, strict=True)]
        starts = np.repeat(self._starts[:-1], counts)
        mixed: np.ndarray = starts + np.concatenate(spaced)
        return mixed


def prepare_mixture(
    config: MixtureConfig, tokenizer: Tokenizer, cache: Path, progress: bool = True
) -> Mixture:
    """Open a mixture whose stores are in the cache; tokenise missing ones.

    Raises:
        UserError: see `build_store`, with the name of the source; or a store has another tokenizer.
    """
    stores = {}
    for name in config.names:
        with _prefix_errors(name):
            if corpus := config.sources[name].corpus:
                stores[name] = prepare_store(corpus, tokenizer, cache, progress)
            else:
                stores[name] = _open_source_store(config, name)
    return Mixture.from_stores(config, stores)


def build_mixture(
    config: MixtureConfig, tokenizer: Tokenizer, folder: Path, progress: bool = True
) -> Mixture:
    """Tokenise the sources into a folder, or resume an earlier call.

    Raises:
        UserError: see `build_store`, with the name of the source; or the folder holds another
            mixture.
    """
    config.text.identity()  # raises for missing files before anything is written
    # Paths in the record must not depend on the working folder.
    sources = {
        name: replace(source, store=str(Path(source.store).resolve())) if source.store else source
        for name, source in config.sources.items()
    }
    config = replace(config, sources=sources)
    entries = {
        name: {"weight": sources[name].weight, "store": sources[name].store or name}
        for name in config.names
    }
    content = (json.dumps({"format": _FORMAT, "sources": entries}, indent=1) + "\n").encode()
    path = folder / MIXTURE
    if path.is_file() and path.read_bytes() != content:
        raise UserError(
            f"out: {folder} holds a mixture of other sources or weights. Choose another out=, and "
            f"reuse its stores there: {{store: {folder / config.names[0]}, weight: 1}}."
        )
    is_new_folder = not folder.exists()
    try:
        for name in config.names:
            if corpus := sources[name].corpus:
                with _prefix_errors(name):
                    build_store(corpus, tokenizer, folder / name, progress=progress)
        stores = {name: _open_source_store(config, name, folder) for name in config.names}
        mixture = Mixture.from_stores(config, stores)
        folder.mkdir(parents=True, exist_ok=True)  # missing if all sources are token stores
        write_atomically(path, content)
        return mixture
    finally:
        if is_new_folder:
            with suppress(OSError):  # finished stores are kept
                folder.rmdir()


def open_store(folder: Path) -> TokenSource:
    """Open the token store or the mixture in a folder.

    Raises:
        UserError: the folder holds neither, or a damaged one.
    """
    return Mixture.open(folder) if (folder / MIXTURE).is_file() else TokenStore.open(folder)


def _open_source_store(config: MixtureConfig, name: str, folder: Path = Path()) -> TokenStore:
    """Open the store of a source: at its path, or under its name in the mixture's folder."""
    with _prefix_errors(name):
        return TokenStore.open(folder / (config.sources[name].store or name))


@contextmanager
def _prefix_errors(name: str) -> Iterator[None]:
    """Prefix the messages of `UserError` with the name of a source."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"data.sources.{name}: {error}") from error
