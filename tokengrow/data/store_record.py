"""The names in a token store and its record ``store.json``: what writer and reader share."""

import json
import os
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from tokengrow.data.corpus import Split
from tokengrow.errors import UserError
from tokengrow.files import write_atomically

MARKER = "store.json"
"""Written last: a folder without it is no token store."""
PROGRESS = "progress.json"
"""How far an unfinished store is; gone from a finished one."""
TOKENIZER = "tokenizer.json"
SPLITS: tuple[Split, ...] = ("train", "validation")
_FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """One file of token ids."""

    file: str
    tokens: int
    bytes: int
    sha256: str

    def check(self, folder: Path) -> None:
        """Raises UserError where the file is missing, of another size or not to be read."""
        path = folder / self.file
        found = path.stat().st_size if path.is_file() else None
        if found != self.bytes:
            state = "is missing" if found is None else f"has {found} bytes, not {self.bytes}"
            raise UserError(
                f"damaged token store: {path} {state}: delete {folder} and make it anew"
            )
        if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
            raise UserError(f"token store: {path} may not be read: change its permissions")


@dataclass(frozen=True, kw_only=True)
class Source:
    """What the tokens in a store were made from; two stores with one source hold the same bytes."""

    identity: dict[str, Any]
    tokenizer: str
    shard_tokens: int


@dataclass(frozen=True, kw_only=True)
class StoreRecord:
    """The contents of ``store.json``."""

    source: Source
    vocab_size: int
    end_of_text: int
    end_of_text_token: str
    splits: dict[str, list[Shard]]

    @property
    def dtype(self) -> str:
        """NumPy's name of the type of a token id in the shards."""
        return token_dtype(self.vocab_size)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the hashes of shards and tokenizer: the content, wherever it lies."""
        hashes = {split: [shard.sha256 for shard in self.splits[split]] for split in SPLITS}
        content = json.dumps({"tokenizer": self.source.tokenizer, **hashes}, sort_keys=True)
        return sha256(content.encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Writes ``store.json``, atomically."""
        values = {"format": _FORMAT, "fingerprint": self.fingerprint, **asdict(self)}
        write_atomically(folder / MARKER, (json.dumps(values, indent=1) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> "StoreRecord":
        """Reads ``store.json``.

        Raises:
            UserError: it is missing or malformed.
        """
        path = folder / MARKER
        if not path.is_file():
            if (folder / PROGRESS).is_file():
                raise UserError(
                    f"half-written token store: {folder} has no {MARKER} yet: run the `tokengrow "
                    f"data` command with out={folder} again, and it goes on where it stopped"
                )
            raise UserError(
                f"no token store: {path} does not exist: make one with `tokengrow data data=NAME "
                f"out={folder}`"
            )
        try:
            values = json.loads(path.read_bytes())
            record = cls(
                source=Source(**values["source"]),
                vocab_size=int(values["vocab_size"]),
                end_of_text=int(values["end_of_text"]),
                end_of_text_token=str(values["end_of_text_token"]),
                splits={
                    split: [Shard(**shard) for shard in values["splits"][split]] for split in SPLITS
                },
            )
            known = values["format"] == _FORMAT and values["fingerprint"] == record.fingerprint
        except (ValueError, KeyError, TypeError, AttributeError):
            known = False
        if not known:
            raise UserError(
                f"damaged token store: {path} is not what this version of tokengrow wrote: delete "
                f"{folder} and make it anew"
            )
        return record


def token_dtype(vocab_size: int) -> str:
    """The little-endian unsigned type that holds every id: two bytes where they suffice."""
    return "<u2" if vocab_size <= 2**16 else "<u4"


def plain(value: Any) -> Any:
    """A value as JSON gives it back (tuples become lists), so that equal means equal."""
    return json.loads(json.dumps(value))
