"""Text sources: config and behaviour of each in one frozen dataclass."""

import math
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
    file_stats,
    first_line,
    import_datasets,
    missing_text,
    read_documents,
)
from tokengrow.errors import UserError

Split = Literal["train", "validation"]

Position = dict[str, Any] | None
"""Position in a source after a document, as JSON values; None if the source has no positions."""


class SourceInterruptedError(UserError):
    """Failure of a source after some documents; what was made of these documents stays valid."""


class Text(Protocol):
    """Documents that a tokenizer can be trained on."""

    def documents(self, split: Split) -> Iterator[str]:
        """See `Corpus.documents`."""

    def identity(self) -> dict[str, Any]:
        """See `Corpus.identity`."""


@dataclass(frozen=True, kw_only=True)
class Corpus(ABC):
    """Source of documents in a fixed order, divided into two splits."""

    validation_fraction: float = 0.02
    """Share of documents held out, in [0, 1), unless the source has its own validation split."""

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise UserError(
                "data.validation_fraction must be at least 0 and less than 1, got "
                f"{self.validation_fraction}."
            )

    @abstractmethod
    def documents(self, split: Split) -> Iterator[str]:
        """Yield the non-empty documents of a split, in the same order at every call.

        Raises:
            UserError: the source is missing or malformed. The message names the file and the
                position in it.
        """

    def resume(self, split: Split, done: int, position: Position) -> Iterator[tuple[str, Position]]:
        """Yield the documents after the first `done`, each with the position after it.

        Args:
            split: the split.
            done: number of documents to skip; 0 starts at the first one.
            position: position after the last skipped document, as JSON decodes it; None: read and
                discard the skipped documents.
        """
        return ((text, None) for text in islice(self.documents(split), done, None))

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return everything that the text depends on, as JSON values.

        A token store of another identity is built again.
        """

    def _select_split(self, split: Split, named_texts: Iterable[tuple[str, str]]) -> Iterator[str]:
        """Yield the texts of (name, text) pairs that belong to the split.

        Only the name decides. A document therefore stays in its split if other documents are added
        or removed, and copies under one name are never in both splits.
        """
        if split == "validation" and not self.validation_fraction:
            return
        for name, text in named_texts:
            digest = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            held_out = int.from_bytes(digest, "little") < self.validation_fraction * 2**64
            if held_out == (split == "validation"):
                yield text


@dataclass(frozen=True, kw_only=True)
class StdlibCorpus(Corpus):
    """Standard library of the running Python: 12 MB of text on every machine.

    Each module is one document; tests are left out. The path of a module decides its split.
    """

    def documents(self, split: Split) -> Iterator[str]:
        """Yield the modules of a split; see `Corpus.documents`."""
        yield from self._select_split(split, self._named_texts())

    def identity(self) -> dict[str, Any]:
        """Return Python's version, and names and sizes of the modules; see `Corpus.identity`."""
        # Only sizes and relative paths: the same Python in another folder gives the same store.
        root = _stdlib_root()
        return {
            "kind": "stdlib",
            "python": platform.python_version(),
            "files": [[name, (root / name).stat().st_size] for name in self._module_names()],
            "validation_fraction": self.validation_fraction,
        }

    def _module_names(self) -> list[str]:
        """Return the paths of the modules, relative to the library, with forward slashes."""
        skipped = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
        root, names = _stdlib_root(), []
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in skipped]
            relative = Path(folder).relative_to(root)
            names += [(relative / name).as_posix() for name in files if name.endswith(".py")]
        if not names:
            raise UserError(
                f"data=stdlib needs this Python's standard library, but {root} has no .py file. "
                "Choose another data=."
            )
        return sorted(names)

    def _named_texts(self) -> Iterator[tuple[str, str]]:
        """Yield (name, text) of each module; skip unreadable, undecodable and empty files."""
        root = _stdlib_root()
        for name in self._module_names():
            try:
                text = (root / name).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if text:
                yield name, text


@dataclass(frozen=True, kw_only=True)
class TextCorpus(Corpus):
    """Files on this machine: plain text, JSON Lines and Parquet, optionally compressed."""

    files: list[str]
    """Files, globs and folders (searched for known extensions), relative to the working folder."""
    validation_files: list[str] = field(default_factory=list)
    """Files of the validation split, excluded from training; if given, `files` is not split."""
    text_key: str = "text"
    """Key of the text in a JSON record, or column of a Parquet file."""

    def documents(self, split: Split) -> Iterator[str]:
        """Yield the documents of the files of a split; see `Corpus.documents`."""
        train, validation = self._split_paths()
        if self.validation_files:
            for path in train if split == "train" else validation:
                yield from read_documents(path, self.text_key)
        else:
            texts = (text for path in train for text in read_documents(path, self.text_key))
            yield from self._select_split(split, ((text, text) for text in texts))

    def identity(self) -> dict[str, Any]:
        """Return paths, sizes and modification times of the files; see `Corpus.identity`."""
        train, validation = self._split_paths()
        return {
            "kind": "text",
            "files": file_stats(train),
            "validation_files": file_stats(validation),
            "text_key": self.text_key,
            "validation_fraction": self.validation_fraction,
        }

    def _split_paths(self) -> tuple[list[Path], list[Path]]:
        """Return the files for training and validation; files named in both are for validation."""
        if not self.files:
            raise UserError("data.files must name at least one file, folder or glob, got [].")
        validation = expand_files(self.validation_files, "data.validation_files")
        train = [path for path in expand_files(self.files, "data.files") if path not in validation]
        return train, validation


@dataclass(frozen=True, kw_only=True)
class HubCorpus(Corpus):
    """Dataset of the Hugging Face Hub, or a local folder with the layout of one.

    Without a `validation_split` the source is read once for each split. If `streaming` is true, it
    is then also transferred twice.
    """

    name: str
    """Name on the Hub, or path of a local folder."""
    subset: str | None = None
    """Configuration of the dataset, if it has several."""
    split: str = "train"
    """Split of the dataset to train on."""
    validation_split: str | None = None
    """Split of the dataset to validate on; null: hold out documents of `split`."""
    streaming: bool = True
    """Read over the network as needed; false: download everything to the datasets cache first."""
    text_key: str = "text"
    """Column that holds the text."""
    revision: str | None = None
    """Branch, tag or commit; a commit fixes the text that the token store was made from."""

    def documents(self, split: Split) -> Iterator[str]:
        """Yield the texts of a split; see `Corpus.documents`."""
        return (text for text, _ in self.resume(split, 0, None))

    def resume(self, split: Split, done: int, position: Position) -> Iterator[tuple[str, Position]]:
        """Yield the texts after the first `done`; see `Corpus.resume`."""
        rows = self._load_rows(split)
        if rows.seek(position):
            done = 0
        texts = self._read_texts(rows)
        if not self.validation_split:
            texts = self._select_split(split, ((text, text) for text in texts))
        return ((text, rows.position()) for text in islice(texts, done, None))

    def identity(self) -> dict[str, Any]:
        """Return the settings, and the files of a local folder; see `Corpus.identity`."""
        folder = Path(self.name).expanduser()
        local_files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {
            "kind": "hub",
            "name": self.name,
            "subset": self.subset,
            "split": self.split,
            "validation_split": self.validation_split,
            "revision": self.revision,
            "files": file_stats(local_files),  # empty for a dataset of the Hub
            "text_key": self.text_key,
            "validation_fraction": self.validation_fraction,
        }

    def _read_texts(self, rows: "_DatasetRows") -> Iterator[str]:
        """Yield the non-empty texts of rows."""
        try:
            for row in rows:
                if not isinstance(row.get(self.text_key), str):
                    place = f"{self.name}, split {rows.split}, record {rows.read}"
                    raise UserError(f"data.text_key: {place}: {missing_text(row, self.text_key)}")
                if row[self.text_key]:
                    yield row[self.text_key]
        except UserError:
            raise
        # The errors of the network and of the formats' readers share no base class.
        except Exception as error:
            raise SourceInterruptedError(
                f"data.name: reading {self.name}, split {rows.split}, failed after record "
                f"{rows.read}: {first_line(error)}. Check the network and the files, then repeat "
                "the command. It resumes after the last finished shard."
            ) from error

    def _load_rows(self, split: Split) -> "_DatasetRows":
        """Load the dataset for a split.

        Raises:
            UserError: the dataset cannot be loaded.
        """
        datasets = import_datasets()
        hub_split = (self.validation_split if split == "validation" else None) or self.split
        try:
            with TemporaryDirectory() as temporary:  # streaming leaves only lock files in a cache
                dataset = datasets.load_dataset(
                    str(Path(self.name).expanduser()) if self.name.startswith("~") else self.name,
                    self.subset,
                    split=hub_split,
                    streaming=self.streaming,
                    revision=self.revision,
                    cache_dir=temporary if self.streaming else None,
                )
        # The errors for wrong names, splits and formats, and for no network, share no base class.
        except Exception as error:
            raise UserError(
                f"data.name: cannot load {self.name!r} (subset {self.subset}, split {hub_split}): "
                f"{first_line(error)}. Check data.name, data.subset, data.split and the network."
            ) from error
        return _DatasetRows(dataset, hub_split, datasets.__version__ if self.streaming else None)


class _DatasetRows:
    """Rows of a dataset in order, counted.

    Attributes:
        split: the dataset's split.
        read: number of rows before the next one, including those skipped by `seek`.
    """

    def __init__(self, dataset: Any, split: str, version: str | None) -> None:
        """Wrap a dataset.

        Args:
            dataset: of the `datasets` library.
            split: its split.
            version: version of the library; None: the dataset has no positions.
        """
        self.split, self.read = split, 0
        self._dataset, self._version = dataset, version

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self._dataset:
            self.read += 1
            yield row

    def position(self) -> Position:
        """Return the position after the last row; None if the dataset has no positions."""
        if self._version is None:
            return None
        state = self._dataset.state_dict()
        return {"datasets": self._version, "read": self.read, "state": state}

    def seek(self, position: Position) -> bool:
        """Continue after a position; return False for None and for other library versions."""
        if position is None or position["datasets"] != self._version:
            return False
        self._dataset.load_state_dict(position["state"])
        self.read = position["read"]
        return True


def first_bytes(documents: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    """Yield documents until their UTF-8 size reaches `max_bytes`.

    The last document is cut at the end of a character, and may therefore be empty.

    Args:
        documents: the documents.
        max_bytes: limit in bytes, at least 1; None: no limit.
    """
    remaining = math.inf if max_bytes is None else max_bytes
    for document in documents:
        content = document.encode()
        fits = len(content) <= remaining
        yield document if fits else content[: int(remaining)].decode(errors="ignore")
        remaining -= len(content)
        if remaining <= 0:
            return


def _stdlib_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


CORPORA: dict[str, type[Corpus]] = {
    "stdlib": StdlibCorpus,
    "text": TextCorpus,
    "hub": HubCorpus,
}
"""Text sources by their names in a config."""
