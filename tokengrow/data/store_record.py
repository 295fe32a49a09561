"""File names in a token store, and its record `store.json`."""

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
"""File that is written last: a folder without it is not a complete token store."""
PROGRESS = "progress.json"
"""File with the state of an unfinished store; removed when the store is complete."""
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
        """Raise `UserError` if the file is missing, unreadable, or has another size."""
        path = folder / self.file
        num_bytes = path.stat().st_size if path.is_file() else None
        if num_bytes != self.bytes:
            size = f"has {num_bytes} bytes instead of {self.bytes}"
            state = "is missing" if num_bytes is None else size
            raise UserError(
                f"Damaged token store: {path} {state}. Delete {folder} and make it again."
            )
        if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
            raise UserError(f"Token store: {path} is not readable. Change its permissions.")


@dataclass(frozen=True, kw_only=True)
class StoreSource:
    """Inputs of a token store; stores with the same inputs hold the same bytes."""

    identity: dict[str, Any]
    """Identity of the corpus."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    shard_tokens: int
    """Tokens after which a shard is closed at the next end of a document."""


@dataclass(frozen=True, kw_only=True)
class StoreRecord:
    """Contents of `store.json`."""

    source: StoreSource
    vocab_size: int
    end_of_text: int
    end_of_text_token: str
    splits: dict[str, list[Shard]]

    @property
    def dtype(self) -> str:
        """NumPy name of the type of a token id in the shards."""
        return token_dtype(self.vocab_size)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the hashes of shards and tokenizer, in hex; independent of the folder."""
        hashes = {split: [shard.sha256 for shard in self.splits[split]] for split in SPLITS}
        content = json.dumps({"tokenizer": self.source.tokenizer, **hashes}, sort_keys=True)
        return sha256(content.encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write `store.json`, atomically."""
        values = {"format": _FORMAT, "fingerprint": self.fingerprint, **asdict(self)}
        write_atomically(folder / MARKER, (json.dumps(values, indent=1) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> "StoreRecord":
        """Read `store.json`.

        Raises:
            UserError: the file is missing or malformed.
        """
        path = folder / MARKER
        if not path.is_file():
            if (folder / PROGRESS).is_file():
                raise UserError(
                    f"Unfinished token store: {folder} has no {MARKER}. Repeat the `tokengrow "
                    f"data` command with out={folder}, which resumes it."
                )
            raise UserError(
                f"Not a token store: {path} does not exist. Make a store with `tokengrow data "
                f"data=NAME out={folder}`."
            )
        try:
            values = json.loads(path.read_bytes())
            record = cls(
                source=StoreSource(**values["source"]),
                vocab_size=int(values["vocab_size"]),
                end_of_text=int(values["end_of_text"]),
                end_of_text_token=str(values["end_of_text_token"]),
                splits={
                    split: [Shard(**shard) for shard in values["splits"][split]] for split in SPLITS
                },
            )
            valid = values["format"] == _FORMAT and values["fingerprint"] == record.fingerprint
        except (ValueError, KeyError, TypeError, AttributeError):
            valid = False
        if not valid:
            raise UserError(
                f"Damaged token store: {path} was not written by this version of tokengrow. Delete "
                f"{folder} and make it again."
            )
        return record


def token_dtype(vocab_size: int) -> str:
    """Return the smaller of uint16 and uint32 (little-endian) that can hold every token id."""
    return "<u2" if vocab_size <= 2**16 else "<u4"
