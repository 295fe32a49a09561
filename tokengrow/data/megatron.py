"""Megatron's token files, as GPT-NeoX writes and reads them: PREFIX.bin and PREFIX.idx.

    PREFIX.bin   token ids of all documents, one after the other, little-endian
    PREFIX.idx   9 bytes    magic `MMIDIDX`, NUL, NUL
                 uint64     version, 1
                 uint8      code of the type of an id
                 uint64     S, the number of sequences (here: documents)
                 uint64     E, the number of entries of the document index
                 int32 [S]  tokens in each sequence
                 int64 [S]  byte offset of each sequence in PREFIX.bin
                 int64 [E]  the sequence at which each document begins, S at the end

Sequences are taken as documents, as the published code takes them: it reads the sizes alone.
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
"""Code in the header to NumPy's name; 6 and 7 are floats, which hold no ids."""
UINT16_BELOW = 65500
"""The published builder takes uint16 for a vocabulary smaller than this, else int32."""

_CHUNK = 2**24
_SAMPLED_BLOCKS, _BLOCK = 256, 4096


@dataclass(frozen=True)
class IndexedTokens:
    """An opened pair of files; nothing is read before it is asked for."""

    prefix: Path
    """Of both files: their path without `.bin` and `.idx`."""
    dtype: np.dtype
    """Type of an id."""
    sizes: np.ndarray
    """int32 [S], memory-mapped: tokens of each document."""
    pointers: np.ndarray
    """int64 [S], memory-mapped: byte offset of each document."""

    @classmethod
    def open(cls, prefix: str | Path) -> "IndexedTokens":
        """Opens the files and checks header, lengths and offsets, not the ids.

        Raises:
            UserError: a file is missing or not of this format; names the file and the byte.
        """
        prefix = Path(str(prefix).removesuffix(".bin").removesuffix(".idx")).expanduser()
        index, data = _with_ending(prefix, ".idx"), _with_ending(prefix, ".bin")
        for path in (index, data):
            if not path.is_file():
                raise UserError(
                    f"{path} does not exist: give the path of the two files without .bin and .idx"
                )
        dtype, count, entries = _read_header(index)
        wanted = HEADER.size + 4 * count + 8 * count + 8 * entries
        if (found := index.stat().st_size) != wanted:
            raise UserError(
                f"{index} has {found} bytes, its header (byte 18) announces {count} sequences and "
                f"{entries} entries, which take {wanted}: copy or build it anew"
            )
        sizes = np.memmap(index, "<i4", "r", HEADER.size, (count,))
        pointers = np.memmap(index, "<i8", "r", HEADER.size + 4 * count, (count,))
        _check_pointers(index, data, sizes, pointers, dtype.itemsize)
        return cls(prefix, dtype, sizes, pointers)

    def __reduce__(self) -> Any:
        # A memory map is pickled as the whole of its content; a loader's worker opens it anew.
        return IndexedTokens.open, (self.prefix,)

    def __len__(self) -> int:
        return len(self.sizes)

    def start(self, document: int) -> int:
        """How many tokens lie in front of a document; `len(self)` stands for behind the last."""
        if document == len(self):
            return self.data.stat().st_size // self.dtype.itemsize
        return int(self.pointers[document]) // self.dtype.itemsize

    def tokens(self, first: int, stop: int, vocab_size: int | None = None) -> TokenArray:
        """The ids of documents `first` to `stop` as one stream; see `TokenArray`."""
        begin, end = self.start(first), self.start(stop)
        return TokenArray([self.data], [end - begin], self.dtype.str, vocab_size, begin)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex over the whole index and 1 MB of the ids, spread over the file.

        The ids of a large corpus take an hour to read; another tokenizer, order or cut of the same
        corpus shows in either.
        """
        size = self.data.stat().st_size
        digest = sha256(f"{size} {file_sha256(_with_ending(self.prefix, '.idx'))}".encode())
        with self.data.open("rb") as file:
            for block in range(_SAMPLED_BLOCKS):
                file.seek(max(0, size - _BLOCK) * block // (_SAMPLED_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
        return digest.hexdigest()

    @property
    def data(self) -> Path:
        """The file of ids."""
        return _with_ending(self.prefix, ".bin")


def _with_ending(prefix: Path, ending: str) -> Path:
    return prefix.with_name(prefix.name + ending)  # the name may hold dots itself: pile_0.87_...


def _read_header(index: Path) -> tuple[np.dtype, int, int]:
    """(dtype, S, E) of an index file."""
    with index.open("rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise UserError(
            f"{index} is no memory-mapped Megatron index: its first 9 bytes are {head[:9]!r}, not "
            f"{MAGIC!r}; build the pair with `tokengrow data to=megatron`, or GPT-NeoX's "
            "preprocess_data.py --dataset-impl mmap"
        )
    _, version, code, count, entries = HEADER.unpack(head)
    if version != VERSION:
        raise UserError(f"{index} byte 9: version {version} is not known, {VERSION} is")
    if code not in DTYPES:
        raise UserError(
            f"{index} byte 17: code {code} is no type of token ids: valid are "
            f"{', '.join(f'{key} ({np.dtype(name).name})' for key, name in DTYPES.items())}"
        )
    if count == 0:
        raise UserError(f"{index} byte 18: it holds no document: build the pair anew")
    return np.dtype(DTYPES[code]), count, entries


def _check_pointers(
    index: Path, data: Path, sizes: np.ndarray, pointers: np.ndarray, itemsize: int
) -> None:
    """Refuses an index whose documents do not lie end to end and fill the data file."""
    expected = 0
    for at in range(0, len(sizes), _CHUNK):
        lengths = np.asarray(sizes[at : at + _CHUNK], dtype=np.int64) * itemsize
        offsets = expected + np.cumsum(lengths) - lengths
        if (negative := np.flatnonzero(lengths < 0)).size:
            document = at + int(negative[0])
            raise UserError(
                f"{index} byte {HEADER.size + 4 * document}: document {document} has "
                f"{sizes[document]} tokens: copy or build the pair anew"
            )
        wrong = np.flatnonzero(pointers[at : at + _CHUNK] != offsets)
        if wrong.size:
            document = at + int(wrong[0])
            place = HEADER.size + 4 * len(sizes) + 8 * document
            raise UserError(
                f"{index} byte {place}: document {document} begins at byte {pointers[document]} "
                f"of the data, not at {offsets[wrong[0]]}, where the one before ends: copy or "
                "build the pair anew"
            )
        expected += int(lengths.sum())
    if (found := data.stat().st_size) != expected:
        raise UserError(
            f"{data} has {found} bytes, {index.name} announces {expected}: the two do not belong "
            "together, or one was cut off; copy or build them anew"
        )


def write_indexed(
    prefix: Path, pieces: Iterable[tuple[np.ndarray, np.ndarray]], vocab_size: int
) -> None:
    """Writes PREFIX.bin and PREFIX.idx as the published builder does, byte for byte.

    Args:
        prefix: path of both files without their endings; neither may be there yet.
        pieces: (token ids, lengths of the documents that end in this piece); a document may lie
            across pieces.
        vocab_size: one more than the largest id; decides between uint16 and int32.
    """
    dtype = np.dtype("<u2" if vocab_size < UINT16_BELOW else "<i4")
    sizes = array("i")
    with ExitStack() as files:
        data = files.enter_context(_with_ending(prefix, ".bin").open("xb"))
        index = files.enter_context(_with_ending(prefix, ".idx").open("xb"))
        for tokens, lengths in pieces:
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
    """Writes each split of a store as a pair of files, and its tokenizer beside them.

    Args:
        store: where the tokens come from.
        folder: must not exist or be empty; it is there whole or not at all.

    Returns:
        The prefixes: `folder/train_text_document`, and `validation_text_document` if there is one.

    Raises:
        UserError: the folder holds something.
    """
    splits = [name for name in SPLITS if len(store.split(name))]
    with atomic_directory(folder) as partial:
        for name in splits:
            pieces = _documents(store.split(name), store.end_of_text)
            write_indexed(partial / f"{name}_text_document", pieces, store.vocab_size)
        store.tokenizer().save(partial / TOKENIZER)
    return [str(folder / f"{name}_text_document") for name in splits]


def _documents(tokens: TokenArray, end_of_text: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The stream in pieces, each with the lengths of the documents that end in it."""
    previous = -1  # place of the last end of text
    for at in range(0, len(tokens), _CHUNK):
        piece = tokens.read(at, min(_CHUNK, len(tokens) - at))
        ends = at + np.flatnonzero(piece == end_of_text)
        yield piece, np.diff(ends, prepend=previous)
        previous = int(ends[-1]) if ends.size else previous
