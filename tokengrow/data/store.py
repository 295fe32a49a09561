"""Token store: a folder of shards that hold a corpus as one stream of token ids.

    store.json                        record, written last: without it the store is incomplete
    train_00000.bin, train_00001.bin  token ids, little-endian uint16 or uint32, documents in order
    validation_00000.bin              the same for the validation split; absent if it is empty
    tokenizer.json                    tokenizer of the text

Every document is followed by the id of the end-of-text token.
"""

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from tokengrow.data.corpus import Corpus, Split
from tokengrow.data.sequences import Sequences, TokenArray, check_split_length
from tokengrow.data.store_record import MARKER, SPLITS, TOKENIZER, StoreRecord
from tokengrow.data.store_writer import write_store
from tokengrow.data.tokenizer import Tokenizer
from tokengrow.errors import UserError
from tokengrow.files import sha256 as file_sha256


@dataclass(frozen=True)
class TokenStore:
    """Complete token store, opened for reading."""

    folder: Path
    record: StoreRecord

    @classmethod
    def open(cls, folder: Path) -> "TokenStore":
        """Open a store; check its record and the size and permissions of every file.

        The contents of the files are not checked; see `verify`.

        Raises:
            UserError: the folder holds no store, or an unfinished or damaged one. The message names
                the file.
        """
        folder = Path(folder)
        record = StoreRecord.load(folder)
        for split in SPLITS:
            for shard in record.splits[split]:
                shard.check(folder)
        if not (folder / TOKENIZER).is_file():
            raise UserError(
                f"Damaged token store: {folder / TOKENIZER} is missing. Delete {folder} and make "
                "it again."
            )
        return cls(folder, record)

    @staticmethod
    def is_complete(folder: Path) -> bool:
        """Return whether a folder holds a complete store."""
        return (folder / MARKER).is_file()

    @property
    def vocab_size(self) -> int:
        """Largest token id that can occur, plus one."""
        return self.record.vocab_size

    @property
    def end_of_text(self) -> int:
        """Id of the token that ends a document."""
        return self.record.end_of_text

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content in hex; independent of the folder and of interruptions."""
        return self.record.fingerprint

    @property
    def identity(self) -> dict[str, Any]:
        """Identity of the corpus that the store was made from."""
        return self.record.source.identity

    def verify(self) -> None:
        """Read all files and compare them with the recorded SHA-256.

        Raises:
            UserError: the content of a file has changed. The message names the file.
        """
        for split in SPLITS:
            for shard in self.record.splits[split]:
                self._compare(shard.file, file_sha256(self.folder / shard.file), shard.sha256)
        self._compare(TOKENIZER, self.tokenizer().fingerprint, self.record.source.tokenizer)

    def _compare(self, name: str, digest: str, recorded: str) -> None:
        """Raise `UserError` if a file has another digest than recorded."""
        if digest != recorded:
            raise UserError(
                f"Damaged token store: {self.folder / name} must have SHA-256 {recorded[:16]}..., "
                f"got {digest[:16]}.... Delete {self.folder} and make it again."
            )

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer that the store was made with."""
        return Tokenizer.from_file(self.folder / TOKENIZER, self.record.end_of_text_token)

    def split(self, name: Split) -> TokenArray:
        """Return the tokens of a split; empty if no documents were held out."""
        shards = self.record.splits[name]
        files = [self.folder / shard.file for shard in shards]
        lengths = [shard.tokens for shard in shards]
        return TokenArray(files, lengths, self.record.dtype, self.vocab_size)

    def sequences(self, name: Split, context_length: int) -> Sequences:
        """Return a split cut into sequences.

        Raises:
            UserError: the split is shorter than one sequence.
        """
        tokens = self.split(name)
        check_split_length(len(tokens), context_length, name)
        return Sequences(tokens, context_length)


def build_store(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    shard_tokens: int = 2**26,
    progress: bool = True,
) -> TokenStore:
    """Tokenise a corpus into a folder, or open the store that an earlier call completed there.

    A call that was killed at any moment can be repeated: it resumes after the last finished shard,
    and the store ends with the same bytes. Two processes may call it for one folder: the second
    waits for the first.

    Args:
        corpus: source of the text.
        tokenizer: tokenizer of the text.
        folder: folder of the store; created if necessary.
        shard_tokens: a shard is closed at the first end of a document after this many tokens.
        progress: show documents, tokens and tokens/s on stderr.

    Raises:
        UserError: the folder holds other files, or a store of another corpus or tokenizer; the
            train split is empty; the corpus is malformed. Nothing is overwritten, and no new files
            remain.
    """
    folder = Path(folder)
    write_store(corpus, tokenizer, folder, shard_tokens=shard_tokens, progress=progress)
    return TokenStore.open(folder)


def prepare_store(
    corpus: Corpus, tokenizer: Tokenizer, cache: Path, progress: bool = True
) -> TokenStore:
    """Open the store of a corpus and a tokenizer in the cache folder; build it if it is missing.

    Raises:
        UserError: see `build_store`.
    """
    source = json.dumps([corpus.identity(), tokenizer.fingerprint])
    key = sha256(source.encode()).hexdigest()[:16]
    return build_store(corpus, tokenizer, cache / "stores" / key, progress=progress)
