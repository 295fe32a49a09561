"""Where the text comes from: config and behaviour of each source in one frozen dataclass."""

import platform
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from tokengrow.data.reading import (
    expand_files,
    import_datasets,
    list_files,
    no_text,
    read_documents,
)
from tokengrow.errors import UserError

Split = Literal["train", "validation"]


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
        root = _stdlib_root()
        relative = (path.relative_to(root) for path in root.rglob("*.py"))
        names = sorted(p.as_posix() for p in relative if not skipped.intersection(p.parts[:-1]))
        if not names:
            raise UserError(
                f"data: no .py file in {root}, this Python's standard library: choose another data="
            )
        return names

    def _texts(self) -> Iterator[tuple[str, str]]:
        for name in self._names():
            try:
                text = (_stdlib_root() / name).read_text(encoding="utf-8")
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
        if self.validation_split:
            yield from self._texts(self.split if split == "train" else self.validation_split)
        else:
            texts = self._texts(self.split)
            yield from self._hold_out(split, ((text, text) for text in texts))

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

    def _texts(self, hub_split: str) -> Iterator[str]:
        for number, row in enumerate(self._load(hub_split), 1):
            if not isinstance(row.get(self.text_key), str):
                place = f"{self.name}, split {hub_split}, record {number}"
                raise UserError(f"data.text_key: {place}: {no_text(row, self.text_key)}")
            if row[self.text_key]:
                yield row[self.text_key]

    def _load(self, hub_split: str) -> Iterable[dict[str, Any]]:
        datasets = import_datasets()
        try:
            with TemporaryDirectory() as throw_away:  # streaming leaves only lock files in a cache
                return datasets.load_dataset(
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


def _stdlib_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


CORPORA: dict[str, type[Corpus]] = {
    "stdlib": StdlibCorpus,
    "text": TextCorpus,
    "hub": HubCorpus,
}
"""The sources by the name that a config gives them."""
