"""Token files of Megatron and GPT-NeoX: PREFIX.bin and PREFIX.idx.

    PREFIX.bin   token ids of all documents, one after the other, little-endian
    PREFIX.idx   9 bytes    magic `MMIDIDX`, NUL, NUL
                 uint64     version, 1
                 uint8      code of the type of an id
                 uint64     S, the number of sequences (here: documents)
                 uint64     E, the number of entries of the document index
                 int32 [S]  tokens in each sequence
                 int64 [S]  byte offset of each sequence in PREFIX.bin
                 int64 [E]  the sequence at which each document begins, S at the end

Each sequence is one document, as in the published code, which reads only the sizes.
"""

import struct
from array import array
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from tokengrow.data.sequences import TokenArray
from tokengrow.data.store import TokenStore
from tokengrow.data.store_record import SPLITS, TOKENIZER
from tokengrow.errors import UserError
from tokengrow.files import atomic_directory
from tokengrow.files import sha256 as file_sha256

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "|u1", 2: "|i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Code in the header to NumPy name; 6 and 7 are float types, which cannot hold ids."""
MIN_INT32_VOCAB_SIZE = 65500
"""Vocabulary size from which the published builder writes int32 instead of uint16."""

_CHUNK_SIZE = 2**24
_NUM_SAMPLED_BLOCKS, _SAMPLED_BLOCK_BYTES = 256, 4096


@dataclass(frozen=True)
class IndexedTokens:
    """Opened pair of token files, read on demand."""

    prefix: Path
    """Path of both files without `.bin` and `.idx`."""
    dtype: np.dtype
    """Type of an id."""
    sizes: np.ndarray
    """Tokens of each document, int32 [S], memory-mapped."""
    pointers: np.ndarray
    """Byte offset of each document, int64 [S], memory-mapped."""

    @classmethod
    def open(cls, prefix: str | Path) -> "IndexedTokens":
        """Open the files; check header, lengths and offsets, but not the ids.

        Raises:
            UserError: a file is missing or does not have this format. The message names the file
                and the byte.
        """
        prefix = Path(str(prefix).removesuffix(".bin").removesuffix(".idx")).expanduser()
        index, data = _with_extension(prefix, ".idx"), _with_extension(prefix, ".bin")
        for path in (index, data):
            if not path.is_file():
                raise UserError(
                    f"{path} does not exist. Give the path of the two files without .bin and .idx."
                )
        dtype, count, entries = _read_header(index)
        expected = HEADER.size + 4 * count + 8 * count + 8 * entries
        if (num_bytes := index.stat().st_size) != expected:
            raise UserError(
                f"{index} must have {expected} bytes, according to the {count} sequences and "
                f"{entries} entries in its header (byte 18), got {num_bytes}. Copy or build it "
                "again."
            )
        sizes = np.memmap(index, "<i4", "r", HEADER.size, (count,))
        pointers = np.memmap(index, "<i8", "r", HEADER.size + 4 * count, (count,))
        _check_pointers(index, data, sizes, pointers, dtype.itemsize)
        return cls(prefix, dtype, sizes, pointers)

    def __reduce__(self) -> Any:
        # Pickling a memory map copies its content. Loader workers reopen the files instead.
        return IndexedTokens.open, (self.prefix,)

    def __len__(self) -> int:
        return len(self.sizes)

    def token_offset(self, document: int) -> int:
        """Return the number of tokens before a document, or all tokens for `len(self)`."""
        if document == len(self):
            return self.data.stat().st_size // self.dtype.itemsize
        return int(self.pointers[document]) // self.dtype.itemsize

    def tokens(self, first: int, stop: int, vocab_size: int | None = None) -> TokenArray:
        """Return the ids of documents `first` to `stop` as one stream; see `TokenArray`."""
        begin, end = self.token_offset(first), self.token_offset(stop)
        return TokenArray([self.data], [end - begin], self.dtype.str, vocab_size, begin)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex over the complete index and 1 MB of the ids, spread over the file.

        Reading the ids of a large corpus takes an hour. Another tokenizer, order or division of the
        same corpus changes the index or the sampled ids.
        """
        size = self.data.stat().st_size
        digest = sha256(f"{size} {file_sha256(_with_extension(self.prefix, '.idx'))}".encode())
        last_start = max(0, size - _SAMPLED_BLOCK_BYTES)
        with self.data.open("rb") as file:
            for block in range(_NUM_SAMPLED_BLOCKS):
                file.seek(last_start * block // (_NUM_SAMPLED_BLOCKS - 1))
                digest.update(file.read(_SAMPLED_BLOCK_BYTES))
        return digest.hexdigest()

    @property
    def data(self) -> Path:
        """File of token ids."""
        return _with_extension(self.prefix, ".bin")


def _with_extension(prefix: Path, extension: str) -> Path:
    """Append an extension to a prefix, which may contain dots itself (pile_0.87_...)."""
    return prefix.with_name(prefix.name + extension)


def _read_header(index: Path) -> tuple[np.dtype, int, int]:
    """Return (dtype, S, E) of an index file."""
    with index.open("rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise UserError(
            f"{index} must be a memory-mapped Megatron index, which starts with {MAGIC!r}, got "
            f"{header[:9]!r}. Build the files with `tokengrow data to=megatron`, or GPT-NeoX's "
            "preprocess_data.py --dataset-impl mmap."
        )
    _, version, code, count, entries = HEADER.unpack(header)
    if version != VERSION:
        raise UserError(f"{index} byte 9: version must be {VERSION}, got {version}.")
    if code not in DTYPES:
        valid = ", ".join(f"{key} ({np.dtype(name).name})" for key, name in DTYPES.items())
        raise UserError(
            f"{index} byte 17: the code of the type of token ids must be one of {valid}, got "
            f"{code}."
        )
    if count == 0:
        raise UserError(f"{index} byte 18: the index has no documents. Build the files again.")
    return np.dtype(DTYPES[code]), count, entries


def _check_pointers(
    index: Path, data: Path, sizes: np.ndarray, pointers: np.ndarray, itemsize: int
) -> None:
    """Raise `UserError` unless the documents are contiguous and fill the data file."""
    expected = 0
    for start in range(0, len(sizes), _CHUNK_SIZE):
        lengths = np.asarray(sizes[start : start + _CHUNK_SIZE], dtype=np.int64) * itemsize
        offsets = expected + np.cumsum(lengths) - lengths
        if (negative := np.flatnonzero(lengths < 0)).size:
            document = start + int(negative[0])
            raise UserError(
                f"{index} byte {HEADER.size + 4 * document}: document {document} must have at "
                f"least 0 tokens, got {sizes[document]}. Copy or build the files again."
            )
        wrong = np.flatnonzero(pointers[start : start + _CHUNK_SIZE] != offsets)
        if wrong.size:
            document = start + int(wrong[0])
            place = HEADER.size + 4 * len(sizes) + 8 * document
            raise UserError(
                f"{index} byte {place}: document {document} must begin at byte "
                f"{offsets[wrong[0]]} of the data, where the previous one ends, got byte "
                f"{pointers[document]}. Copy or build the files again."
            )
        expected += int(lengths.sum())
    if (num_bytes := data.stat().st_size) != expected:
        raise UserError(
            f"{data} must have {expected} bytes, according to {index.name}, got {num_bytes}. One "
            "of the files is truncated, or they do not belong together. Copy or build them again."
        )


def write_indexed_tokens(
    prefix: Path, chunks: Iterable[tuple[np.ndarray, np.ndarray]], vocab_size: int
) -> None:
    """Write PREFIX.bin and PREFIX.idx as the published builder does, byte for byte.

    Args:
        prefix: path of both files without their extensions; neither file may exist.
        chunks: (token ids, lengths of the documents that end in this chunk); a document may span
            chunks.
        vocab_size: largest id plus one; selects uint16 or int32.
    """
    dtype = np.dtype("<u2" if vocab_size < MIN_INT32_VOCAB_SIZE else "<i4")
    sizes = array("i")
    with ExitStack() as files:
        data = files.enter_context(_with_extension(prefix, ".bin").open("xb"))
        index = files.enter_context(_with_extension(prefix, ".idx").open("xb"))
        for tokens, lengths in chunks:
            data.write(tokens.astype(dtype).tobytes())
            sizes.frombytes(lengths.astype("i").tobytes())
        lengths = np.frombuffer(sizes, "i")
        ends = np.cumsum(lengths, dtype="<i8") * dtype.itemsize
        assert len(lengths) and ends[-1] == data.tell(), "every token belongs to a document"
        code = next(code for code, name in DTYPES.items() if np.dtype(name) == dtype)
        index.write(HEADER.pack(MAGIC, VERSION, code, len(lengths), len(lengths) + 1))
        index.write(lengths.astype("<i4").tobytes())
        index.write((ends - lengths * dtype.itemsize).astype("<i8").tobytes())
        index.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())


def export_store(store: TokenStore, folder: Path) -> list[str]:
    """Write each split of a store as a pair of files, and the tokenizer of the store.

    Args:
        store: source of the tokens.
        folder: new or empty folder; it is written atomically.

    Returns:
        The prefixes: `folder/train_text_document`, and `folder/validation_text_document` if the
        validation split is not empty.

    Raises:
        UserError: the folder is not empty.
    """
    splits = [name for name in SPLITS if len(store.split(name))]
    with atomic_directory(folder) as partial:
        for name in splits:
            chunks = _document_chunks(store.split(name), store.end_of_text)
            write_indexed_tokens(partial / f"{name}_text_document", chunks, store.vocab_size)
        store.tokenizer().save(partial / TOKENIZER)
    return [str(folder / f"{name}_text_document") for name in splits]


def _document_chunks(
    tokens: TokenArray, end_of_text: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield chunks of the stream, each with the lengths of the documents that end in it."""
    previous_end = -1  # position of the last end of text
    for start in range(0, len(tokens), _CHUNK_SIZE):
        chunk = tokens.read(start, min(_CHUNK_SIZE, len(tokens) - start))
        ends = start + np.flatnonzero(chunk == end_of_text)
        yield chunk, np.diff(ends, prepend=previous_end)
        previous_end = int(ends[-1]) if ends.size else previous_end
