"""Where the text comes from: config and behaviour of each source in one frozen dataclass."""

import os
import platform
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Protocol

from tokengrow.data.readers import (
    expand_files,
    import_datasets,
    list_files,
    no_text,
    read_documents,
)
from tokengrow.errors import UserError

Split = Literal["train", "validation"]


class BrokenOffError(UserError):
    """A source that could be read up to a point: what was made of it so far is right."""


class Text(Protocol):
    """What a tokenizer can be trained on."""

    def documents(self, split: Split) -> Iterator[str]:
        """See `Corpus.documents`."""

    def identity(self) -> dict[str, Any]:
        """See `Corpus.identity`."""


@dataclass(frozen=True, kw_only=True)
class Corpus(ABC):
    """A source of documents in a fixed order, divided into two splits."""

    validation_fraction: float = 0.02
    """Share of documents held out, in [0, 1), where the source has no validation split itself."""

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise UserError(
                f"data.validation_fraction is {self.validation_fraction}: give a share of at least "
                "0 and less than 1"
            )

    @abstractmethod
    def documents(self, split: Split) -> Iterator[str]:
        """The documents of a split, none of them empty, in the same order at every call.

        Raises:
            UserError: the source is missing or malformed; names the file and the place in it.
        """

    def resume(self, split: Split, done: int, place: Any) -> Iterator[tuple[str, Any]]:
        """The documents behind the first `done`, each with the place behind it.

        Args:
            split: which split.
            done: documents to leave out, 0 for a beginning.
            place: what came with the last of these, as JSON gives it back; None where a source has
                none, and then they are read and dropped.
        """
        return ((text, None) for text in islice(self.documents(split), done, None))

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the text depends on, as JSON values: when it changes, so must the token store."""

    def _hold_out(self, split: Split, named: Iterable[tuple[str, str]]) -> Iterator[str]:
        """The texts of (name, text) pairs that belong to the split.

        The name alone decides, so a document stays in its split when others come or go, and a
        document that occurs twice under one name is never in both.
        """
        if split == "validation" and not self.validation_fraction:
            return
        for name, text in named:
            digest = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            held_out = int.from_bytes(digest, "little") < self.validation_fraction * 2**64
            if held_out == (split == "validation"):
                yield text


@dataclass(frozen=True, kw_only=True)
class StdlibCorpus(Corpus):
    """The standard library of the running Python: 12 MB of text on every machine.

    A document is one module without its tests; the split goes by the module's path.
    """

    def documents(self, split: Split) -> Iterator[str]:
        yield from self._hold_out(split, self._texts())

    def identity(self) -> dict[str, Any]:
        # Sizes and relative paths only: the same Python elsewhere gives the same store.
        root = _stdlib_root()
        return {
            "kind": "stdlib",
            "python": platform.python_version(),
            "files": [[name, (root / name).stat().st_size] for name in self._names()],
            "validation_fraction": self.validation_fraction,
        }

    def _names(self) -> list[str]:
        """Paths of the modules relative to the library, with forward slashes, sorted."""
        skipped = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
        root, names = _stdlib_root(), []
        for folder, inside, files in os.walk(root):
            inside[:] = [name for name in inside if name not in skipped]
            under = Path(folder).relative_to(root)
            names += [(under / name).as_posix() for name in files if name.endswith(".py")]
        if not names:
            raise UserError(
                f"data: no .py file in {root}, this Python's standard library: choose another data="
            )
        return sorted(names)

    def _texts(self) -> Iterator[tuple[str, str]]:
        root = _stdlib_root()
        for name in self._names():
            try:
                text = (root / name).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if text:
                yield name, text


@dataclass(frozen=True, kw_only=True)
class TextCorpus(Corpus):
    """Files on this machine: plain text, JSON Lines and Parquet, also compressed."""

    files: list[str]
    """Files, globs and folders (searched for known endings), relative to the working folder."""
    validation_files: list[str] = field(default_factory=list)
    """The validation split: nothing is held out of ``files`` then, and none of these trained on."""
    text_key: str = "text"
    """Key of the text in a JSON record, or column of a Parquet file."""

    def documents(self, split: Split) -> Iterator[str]:
        train, validation = self._paths()
        if self.validation_files:
            for path in train if split == "train" else validation:
                yield from read_documents(path, self.text_key)
        else:
            texts = (text for path in train for text in read_documents(path, self.text_key))
            yield from self._hold_out(split, ((text, text) for text in texts))

    def identity(self) -> dict[str, Any]:
        train, validation = self._paths()
        return {
            "kind": "text",
            "files": list_files(train),
            "validation_files": list_files(validation),
            "text_key": self.text_key,
            "validation_fraction": self.validation_fraction,
        }

    def _paths(self) -> tuple[list[Path], list[Path]]:
        """The files of the two splits; where they overlap, validation has them."""
        if not self.files:
            raise UserError("data.files is empty: name at least one file, folder or glob")
        validation = expand_files(self.validation_files, "data.validation_files")
        train = [path for path in expand_files(self.files, "data.files") if path not in validation]
        return train, validation


@dataclass(frozen=True, kw_only=True)
class HubCorpus(Corpus):
    """A dataset of the Hugging Face Hub, or a local folder laid out like one.

    Without a ``validation_split`` the source is read once for each split; with ``streaming`` that
    means that it is also transferred twice.
    """

    name: str
    """Name on the Hub, or path of a local folder."""
    subset: str | None = None
    """Configuration of the dataset, where it has several."""
    split: str = "train"
    """The dataset's split to train on."""
    validation_split: str | None = None
    """The dataset's split to validate on; null: hold documents out of ``split``."""
    streaming: bool = True
    """Read over the network as needed; false: download everything to the datasets cache first."""
    text_key: str = "text"
    """Column that holds the text."""
    revision: str | None = None
    """Branch, tag or commit; a commit keeps the text from changing under the token store."""

    def documents(self, split: Split) -> Iterator[str]:
        return (text for text, _ in self.resume(split, 0, None))

    def resume(self, split: Split, done: int, place: Any) -> Iterator[tuple[str, Any]]:
        rows = self._rows(split)
        if rows.go_to(place):
            done = 0
        texts = self._texts(rows)
        if not self.validation_split:
            texts = self._hold_out(split, ((text, text) for text in texts))
        return ((text, rows.place()) for text in islice(texts, done, None))

    def identity(self) -> dict[str, Any]:
        folder = Path(self.name).expanduser()
        inside = sorted(path for path in folder.rglob("*") if path.is_file())
        return {
            "kind": "hub",
            "name": self.name,
            "subset": self.subset,
            "split": self.split,
            "validation_split": self.validation_split,
            "revision": self.revision,
            "files": list_files(inside),  # of a local folder; none on the Hub
            "text_key": self.text_key,
            "validation_fraction": self.validation_fraction,
        }

    def _texts(self, rows: "_Rows") -> Iterator[str]:
        for row in self._readable(rows):
            if not isinstance(row.get(self.text_key), str):
                place = f"{self.name}, split {rows.split}, record {rows.read}"
                raise UserError(f"data.text_key: {place}: {no_text(row, self.text_key)}")
            if row[self.text_key]:
                yield row[self.text_key]

    def _readable(self, rows: "_Rows") -> Iterator[dict[str, Any]]:
        try:
            yield from rows
        # The network, or any of the formats' readers: again no common base class.
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BrokenOffError(
                f"data.name: {self.name}, split {rows.split}, cannot be read behind record "
                f"{rows.read}: {reason}: check the network and the files; the same command then "
                "goes on from its last finished shard"
            ) from error

    def _rows(self, split: Split) -> "_Rows":
        datasets = import_datasets()
        hub_split = (self.validation_split if split == "validation" else None) or self.split
        try:
            with TemporaryDirectory() as throw_away:  # streaming leaves only lock files in a cache
                dataset = datasets.load_dataset(
                    str(Path(self.name).expanduser()) if self.name.startswith("~") else self.name,
                    self.subset,
                    split=hub_split,
                    streaming=self.streaming,
                    revision=self.revision,
                    cache_dir=throw_away if self.streaming else None,
                )
        # No common base class: wrong names, splits and formats, and no network, all end here.
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"data.name: cannot load {self.name!r} (subset {self.subset}, split {hub_split}): "
                f"{reason}: check data.name, data.subset, data.split and the network"
            ) from error
        return _Rows(dataset, hub_split, datasets.__version__ if self.streaming else None)


class _Rows:
    """The rows of a dataset in order, counted.

    Attributes:
        split: the dataset's, that they are of.
        read: rows given out, those in front of the place that `go_to` went to included.
    """

    def __init__(self, dataset: Any, split: str, version: str | None) -> None:
        self.split, self.read = split, 0
        self._dataset, self._version = dataset, version

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self._dataset:
            self.read += 1
            yield row

    def place(self) -> Any:
        """Behind the row given out last; None where the dataset has no places."""
        if self._version is None:
            return None
        state = self._dataset.state_dict()
        return {"datasets": self._version, "read": self.read, "state": state}

    def go_to(self, place: Any) -> bool:
        """Whether the next row is the one behind a place; its library's other versions have
        others."""
        if place is None or place["datasets"] != self._version:
            return False
        self._dataset.load_state_dict(place["state"])
        self.read = place["read"]
        return True


def _stdlib_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


CORPORA: dict[str, type[Corpus]] = {
    "stdlib": StdlibCorpus,
    "text": TextCorpus,
    "hub": HubCorpus,
}
"""The sources by the name that a config gives them."""
