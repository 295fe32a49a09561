"""Several sources mixed in fixed shares: each a token store, all of one tokenizer.

A folder of a mixture, as `tokengrow data` writes it, holds a store for each source, under its name,
and `mixture.json`, written last: weights, and where the stores are.
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
from tokengrow.data.order import BLOCK, apportion, mixed_indices
from tokengrow.data.sequences import Sequences, TokenSource
from tokengrow.data.store import TokenStore, build_store, prepare_store
from tokengrow.data.tokenizer import Tokenizer
from tokengrow.errors import UserError
from tokengrow.files import write_atomically

MIXTURE = "mixture.json"
"""Makes a folder one of a mixture."""
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class MixedSource:
    """One source of a mixture: text, or a store of it."""

    weight: float = 1.0
    """Its share of the training sequences is this over the sum of all weights."""
    corpus: Corpus | None = None
    """The text; None: it is tokenised already."""
    store: str | None = None
    """Folder of its token store, in place of text."""


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """Which sources, and how much of each."""

    sources: dict[str, MixedSource]
    """By their names, of letters, digits, `-`, `_` and `.`."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("data.sources is empty: name at least one source with its weight")
        for name, source in self.sources.items():
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise UserError(
                    f"data.sources: {name!r} is no name for a source: take letters, digits, -, _"
                )
            if not 0 < source.weight < math.inf:
                raise UserError(
                    f"data.sources.{name}.weight is {source.weight:g}: give a number above 0"
                )
        for name, quota in zip(self.names, self.quotas, strict=True):
            if not quota:
                raise UserError(
                    f"data.sources.{name}.weight is {self.sources[name].weight:g}, less than half "
                    f"a sequence in {BLOCK:,}: raise it, or leave the source out"
                )

    @property
    def names(self) -> list[str]:
        """Sorted: in which order sources are listed decides nothing."""
        return sorted(self.sources)

    @property
    def quotas(self) -> tuple[int, ...]:
        """Of `BLOCK` sequences, how many are of each of the names."""
        return apportion(BLOCK, [self.sources[name].weight for name in self.names])

    @property
    def text(self) -> "MixtureText":
        """What a tokenizer is trained on."""
        pairs = ((name, self.sources[name].corpus) for name in self.names)
        return MixtureText({name: corpus for name, corpus in pairs if corpus})

    def stored_tokenizer(self) -> Tokenizer | None:
        """That of a source that is tokenised already; None where none is."""
        for name in self.names:
            if folder := self.sources[name].store:
                with _of(name):
                    return TokenStore.open(Path(folder)).tokenizer()
        return None


@dataclass(frozen=True)
class MixtureText:
    """The text of several sources, an equal part of each at any time.

    It knows no weights: others would train another tokenizer, and tokenise everything anew.
    """

    corpora: dict[str, Corpus]
    """By name, in order."""

    def documents(self, split: Split) -> Iterator[str]:
        """The next document is one of the source that has given fewest characters so far."""
        open_sources = {name: corpus.documents(split) for name, corpus in self.corpora.items()}
        given = dict.fromkeys(open_sources, 0)
        while open_sources:
            name = min(open_sources, key=given.__getitem__)
            with _of(name):
                text = next(open_sources[name], None)
            if text is None:
                del open_sources[name]
            else:
                given[name] += len(text)
                yield text

    def identity(self) -> dict[str, Any]:
        """What the text depends on, as JSON values."""
        identities = {}
        for name, corpus in self.corpora.items():
            with _of(name):
                identities[name] = corpus.identity()
        return {"kind": "mixture", "sources": identities}


@dataclass(frozen=True)
class Mixture:
    """A `TokenSource` over several stores."""

    stores: dict[str, TokenStore]
    """By name, in order."""
    quotas: tuple[int, ...]
    """Sequences of each in a block of `BLOCK`."""

    @classmethod
    def open(cls, folder: Path) -> "Mixture":
        """The mixture that `build_mixture` left in a folder.

        Raises:
            UserError: a record that is not its own, or a store that is missing or damaged.
        """
        path = folder / MIXTURE
        try:
            record = json.loads(path.read_bytes())
            known = record["format"] == _FORMAT
            sources = {
                str(name): MixedSource(weight=float(entry["weight"]), store=str(entry["store"]))
                for name, entry in record["sources"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            known = False
        if not known:
            raise UserError(
                f"damaged mixture: {path} is not what this version of tokengrow wrote: run the "
                f"`tokengrow data` command with out={folder} again once the file is out of the way"
            )
        config = MixtureConfig(sources=sources)
        return cls.of(config, {name: _stored(config, name, folder) for name in config.names})

    @classmethod
    def of(cls, config: MixtureConfig, stores: dict[str, TokenStore]) -> "Mixture":
        """The stores of a config's names, mixed as it says.

        Raises:
            UserError: stores of several tokenizers.
        """
        first = next(iter(stores))
        for name, store in stores.items():
            if store.record.source.tokenizer != stores[first].record.source.tokenizer:
                raise UserError(
                    f"data.sources: {name} ({store.folder}) and {first} ({stores[first].folder}) "
                    "hold the tokens of different tokenizers: make both with the same one "
                    "(tokenizer=file tokenizer.file=PATH)"
                )
        return cls(stores, config.quotas)

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id that can occur."""
        return max(store.vocab_size for store in self.stores.values())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex over names, shares and content of the sources."""
        sources = {
            name: [quota, store.fingerprint]
            for (name, store), quota in zip(self.stores.items(), self.quotas, strict=True)
        }
        return sha256(json.dumps({"mixture": sources}, sort_keys=True).encode()).hexdigest()

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all."""
        return next(iter(self.stores.values())).tokenizer()

    def sequences(self, name: Split, context_length: int) -> Sequences:
        """A split of all sources, each cut into sequences.

        Raises:
            UserError: a source whose split is shorter than one sequence.
        """
        parts = []
        for source, store in self.stores.items():
            with _of(source):
                parts.append(store.sequences(name, context_length))
        return MixedSequences(parts, self.quotas)

    def lines(self) -> Iterator[str]:
        """What it consists of, a line for each source."""
        for (name, store), quota in zip(self.stores.items(), self.quotas, strict=True):
            yield (
                f"{name}: {quota / BLOCK:.2%} of the sequences, from "
                f"{len(store.split('train')):,} training and {len(store.split('validation')):,} "
                f"validation tokens in {store.folder}"
            )


class MixedSequences(Sequences):
    """The sequences of all sources, those of one behind those of another; batches mix them."""

    def __init__(self, parts: list[Sequences], quotas: tuple[int, ...]) -> None:
        self.context_length = parts[0].context_length  # there is no one stream of tokens
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

    def batch(self, number: int, size: int, seed: int) -> np.ndarray:
        """The sequences of global batch ``number``, int64 [size]: see `order.mixed_indices`."""
        sources, indices = mixed_indices(seed, number, size, self._quotas, self._lengths)
        return np.array(self._starts)[sources] + indices

    def spread(self, count: int) -> np.ndarray:
        """Each source its share of `count`, spread evenly over it, int64 [count]; one that has too
        few for its share comes several times."""
        counts = apportion(count, self._quotas)
        spreads = [part.spread(own) for part, own in zip(self._parts, counts, strict=True)]
        starts = np.repeat(self._starts[:-1], counts)
        return starts + np.concatenate(spreads)


def prepare_mixture(
    config: MixtureConfig, tokenizer: Tokenizer, cache: Path, progress: bool = True
) -> Mixture:
    """A mixture whose stores are in the cache, tokenised where they are not there yet.

    Raises:
        UserError: as `build_store`, with the source's name; a store of another tokenizer.
    """
    stores = {}
    for name in config.names:
        with _of(name):
            if corpus := config.sources[name].corpus:
                stores[name] = prepare_store(corpus, tokenizer, cache, progress)
            else:
                stores[name] = _stored(config, name)
    return Mixture.of(config, stores)


def build_mixture(
    config: MixtureConfig, tokenizer: Tokenizer, folder: Path, progress: bool = True
) -> Mixture:
    """Tokenises the sources into a folder, or goes on where an earlier call stopped.

    Raises:
        UserError: as `build_store`, with the source's name; a folder of another mixture.
    """
    config.text.identity()  # before anything is made: it refuses missing files
    config = _resolved(config)
    entries = {}
    for name in config.names:
        source = config.sources[name]
        entries[name] = {"weight": source.weight, "store": source.store or name}
    content = (json.dumps({"format": _FORMAT, "sources": entries}, indent=1) + "\n").encode()
    path = folder / MIXTURE
    if path.is_file() and path.read_bytes() != content:
        raise UserError(
            f"out: {folder} holds a mixture of other sources or weights: choose another out=; its "
            "stores can be named there as {store: " + str(folder / config.names[0]) + ", weight: 1}"
        )
    is_new_folder = not folder.exists()
    try:
        for name in config.names:
            if corpus := config.sources[name].corpus:
                with _of(name):
                    build_store(corpus, tokenizer, folder / name, progress=progress)
        stores = {name: _stored(config, name, folder) for name in config.names}
        mixture = Mixture.of(config, stores)
        folder.mkdir(parents=True, exist_ok=True)  # where all sources are stores already
        write_atomically(path, content)
        return mixture
    finally:
        if is_new_folder:
            with suppress(OSError):  # what is finished stays
                folder.rmdir()


def open_store(folder: Path) -> TokenSource:
    """The token store or the mixture in a folder.

    Raises:
        UserError: neither, or a damaged one.
    """
    return Mixture.open(folder) if (folder / MIXTURE).is_file() else TokenStore.open(folder)


def _resolved(config: MixtureConfig) -> MixtureConfig:
    """The same with absolute paths of stores, which lie elsewhere than the mixture's own."""
    sources = {
        name: replace(each, store=str(Path(each.store).resolve())) if each.store else each
        for name, each in config.sources.items()
    }
    return replace(config, sources=sources)


def _stored(config: MixtureConfig, name: str, folder: Path = Path()) -> TokenStore:
    """A source's store: where the config says, or in the mixture's folder under its name."""
    with _of(name):
        return TokenStore.open(folder / (config.sources[name].store or name))


@contextmanager
def _of(name: str) -> Iterator[None]:
    """Puts a source's name in front of what is said of it."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"data.sources.{name}: {error}") from error
