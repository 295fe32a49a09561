"""A token store: a folder of shards that hold a corpus as one stream of token ids.

    store.json                        the record, written last: without it there is no store
    train_00000.bin, train_00001.bin  token ids, little-endian uint16 or uint32, documents in order
    validation_00000.bin              the same for the other split; none where it is empty
    tokenizer.json                    turned the text into ids, and turns ids into text again

Every document is followed by the id of the end-of-text token.
"""

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from tokengrow.data.corpus import Corpus, Split
from tokengrow.data.sequences import Sequences, TokenArray, check_length
from tokengrow.data.store_record import MARKER, SPLITS, TOKENIZER, StoreRecord
from tokengrow.data.store_writer import write_store
from tokengrow.data.tokenizer import Tokenizer
from tokengrow.errors import UserError
from tokengrow.files import sha256 as file_sha256


@dataclass(frozen=True)
class TokenStore:
    """A complete token store, opened for reading."""

    folder: Path
    record: StoreRecord

    @classmethod
    def open(cls, folder: Path) -> "TokenStore":
        """Opens a store; checks its record, the size of every file and that it can be read, not the
        contents.

        Raises:
            UserError: no store, a half-written or a damaged one; names the file.
        """
        folder = Path(folder)
        record = StoreRecord.load(folder)
        for split in SPLITS:
            for shard in record.splits[split]:
                shard.check(folder)
        if not (folder / TOKENIZER).is_file():
            raise UserError(
                f"damaged token store: {folder / TOKENIZER} is missing: delete {folder} and make "
                "it anew"
            )
        return cls(folder, record)

    @staticmethod
    def is_complete(folder: Path) -> bool:
        """Whether a store was finished in this folder."""
        return (folder / MARKER).is_file()

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id that can occur."""
        return self.record.vocab_size

    @property
    def end_of_text(self) -> int:
        """Id of the token that ends a document."""
        return self.record.end_of_text

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content in hex: the same wherever and in however many runs it was made."""
        return self.record.fingerprint

    @property
    def identity(self) -> dict[str, Any]:
        """The identity of the corpus that the store was made from."""
        return self.record.source.identity

    def verify(self) -> None:
        """Reads everything and compares it with the recorded SHA-256.

        Raises:
            UserError: a file whose content has changed, by name.
        """
        for split in SPLITS:
            for shard in self.record.splits[split]:
                self._compare(shard.file, file_sha256(self.folder / shard.file), shard.sha256)
        self._compare(TOKENIZER, self.tokenizer().fingerprint, self.record.source.tokenizer)

    def _compare(self, name: str, found: str, recorded: str) -> None:
        if found != recorded:
            raise UserError(
                f"damaged token store: {self.folder / name} has SHA-256 {found[:16]}..., not the "
                f"recorded {recorded[:16]}...: delete {self.folder} and make it anew"
            )

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the store was made with."""
        return Tokenizer.from_file(self.folder / TOKENIZER, self.record.end_of_text_token)

    def split(self, name: Split) -> TokenArray:
        """The tokens of a split; empty where nothing was held out."""
        shards = self.record.splits[name]
        files = [self.folder / shard.file for shard in shards]
        lengths = [shard.tokens for shard in shards]
        return TokenArray(files, lengths, self.record.dtype, self.vocab_size)

    def sequences(self, name: Split, context_length: int) -> Sequences:
        """A split cut into sequences.

        Raises:
            UserError: the split is shorter than one sequence.
        """
        tokens = self.split(name)
        check_length(len(tokens), context_length, name)
        return Sequences(tokens, context_length)


def build_store(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    shard_tokens: int = 2**26,
    progress: bool = True,
) -> TokenStore:
    """Tokenises a corpus into a folder, or opens the store that an earlier call left there.

    Killed at any moment and called again, it goes on after the last finished shard and ends with
    the same bytes. Two processes may call it for one folder: the second waits for the first.

    Args:
        corpus: where the text comes from.
        tokenizer: turns it into ids.
        folder: where the store goes; made if need be.
        shard_tokens: a shard is closed at the first end of a document past so many tokens.
        progress: show documents, tokens and tokens/s on stderr.

    Raises:
        UserError: the folder holds something else, or a store of another corpus or tokenizer; the
            train split is empty; the corpus is malformed. Nothing is overwritten or left behind.
    """
    folder = Path(folder)
    write_store(corpus, tokenizer, folder, shard_tokens=shard_tokens, progress=progress)
    return TokenStore.open(folder)


def prepare_store(
    corpus: Corpus, tokenizer: Tokenizer, cache: Path, progress: bool = True
) -> TokenStore:
    """The store of a corpus and a tokenizer in the cache folder, built where it is not there yet.

    Raises:
        UserError: as ``build_store``.
    """
    source = json.dumps([corpus.identity(), tokenizer.fingerprint])
    key = sha256(source.encode()).hexdigest()[:16]
    return build_store(corpus, tokenizer, cache / "stores" / key, progress=progress)
