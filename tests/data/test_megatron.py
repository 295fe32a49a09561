"""Tests of Megatron token files: reading, errors for damaged files, and writing as published."""

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tokengrow.data.megatron import HEADER, IndexedTokens, export_store, write_indexed_tokens
from tokengrow.data.store import TokenStore
from tokengrow.data.tokenizer import Tokenizer
from tokengrow.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "H_mmap_seed1234"
FILES = {"uint16": 50277, "int32": 100000}
"""Type that the published builder chooses, and a vocabulary size that leads to it."""


@pytest.fixture(scope="module")
def documents() -> list[np.ndarray]:
    """Documents that the published builder wrote (240)."""
    listed = json.loads((GOLDEN / "documents.json").read_text())["documents"]
    return [np.array(document) for document in listed]


@pytest.mark.parametrize("kind", FILES)
def test_documents_are_read_as_written(kind: str, documents: list[np.ndarray]) -> None:
    files = IndexedTokens.open(GOLDEN / f"data_{kind}")
    assert len(files) == len(documents) == 240
    assert files.dtype == kind
    for number, document in enumerate(documents):
        found = files.tokens(number, number + 1).read(0, len(document))
        assert found.dtype == np.int64
        assert np.array_equal(found, document)
    assert max(int(document.max()) for document in documents) > 2**15  # no sign in uint16


@pytest.mark.parametrize("kind", FILES)
def test_consecutive_documents_are_one_stream(kind: str, documents: list[np.ndarray]) -> None:
    tokens = IndexedTokens.open(GOLDEN / f"data_{kind}").tokens(100, 240)
    assert np.array_equal(tokens.read(0, len(tokens)), np.concatenate(documents[100:]))


@pytest.mark.parametrize(("kind", "vocab_size"), FILES.items())
@pytest.mark.parametrize("group_size", [240, 7, 1])
def test_written_files_equal_published_files(
    kind: str, vocab_size: int, group_size: int, documents: list[np.ndarray], tmp_path: Path
) -> None:
    groups = [documents[at : at + group_size] for at in range(0, 240, group_size)]
    chunks = [(np.concatenate(group), np.array([len(d) for d in group])) for group in groups]
    write_indexed_tokens(tmp_path / "written", iter(chunks), vocab_size)
    for extension in (".bin", ".idx"):
        published = (GOLDEN / f"data_{kind}{extension}").read_bytes()
        assert (tmp_path / f"written{extension}").read_bytes() == published


def test_vocabulary_of_65500_takes_four_bytes(tmp_path: Path) -> None:
    for vocab_size, itemsize in ((65499, 2), (65500, 4)):
        write_indexed_tokens(
            tmp_path / str(itemsize), [(np.arange(6), np.array([2, 4]))], vocab_size
        )
        assert (tmp_path / f"{itemsize}.bin").stat().st_size == 6 * itemsize


def test_export_keeps_documents_and_tokenizer(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokengrow.data.megatron._CHUNK_SIZE", 1000)  # documents span chunks
    prefixes = export_store(store, tmp_path / "out")
    assert [Path(prefix).name for prefix in prefixes] == [
        "train_text_document",
        "validation_text_document",
    ]
    for prefix, split in zip(prefixes, ("train", "validation"), strict=True):
        files, tokens = IndexedTokens.open(prefix), store.split(split)
        stream = files.tokens(0, len(files))
        assert np.array_equal(stream.read(0, len(stream)), tokens.read(0, len(tokens)))
        last = [
            stream.read(files.token_offset(number + 1) - 1, 1)[0] for number in range(len(files))
        ]
        assert set(last) == {store.end_of_text}
        assert len(files) == (tokens.read(0, len(tokens)) == store.end_of_text).sum()
    tokenizer = Tokenizer.from_file(tmp_path / "out" / "tokenizer.json")
    assert tokenizer.fingerprint == store.tokenizer().fingerprint


def test_unpickling_reopens_files() -> None:
    files = IndexedTokens.open(GOLDEN / "data_uint16")
    content = pickle.dumps(files)
    assert len(content) < 1000
    assert np.array_equal(pickle.loads(content).sizes, files.sizes)


def test_fingerprint_depends_only_on_content(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        for extension in (".bin", ".idx"):
            (tmp_path / f"{name}{extension}").write_bytes(
                (GOLDEN / f"data_uint16{extension}").read_bytes()
            )
    changed = bytearray((tmp_path / "c.bin").read_bytes())
    changed[-1] ^= 1
    (tmp_path / "c.bin").write_bytes(changed)
    a, b, c = (IndexedTokens.open(tmp_path / name).fingerprint for name in ("a", "b", "c"))
    assert a == b != c
    assert a != IndexedTokens.open(GOLDEN / "data_int32").fingerprint


def patch_bytes(offset: int, content: bytes) -> Callable[[bytes], bytes]:
    """Return a function that overwrites bytes from an offset."""
    return lambda original: original[:offset] + content + original[offset + len(content) :]


POINTER_5_OFFSET = HEADER.size + 4 * 240 + 8 * 5

DAMAGES = {
    "another format": (".idx", patch_bytes(0, b"TNTIDX\0\0\0"), "starts with .*, got b'TNTIDX"),
    "empty": (".idx", lambda original: b"", "starts with .*, got b''"),
    "half a header": (
        ".idx",
        lambda original: original[:20],
        "must be a memory-mapped Megatron index",
    ),
    "version": (".idx", patch_bytes(9, struct.pack("<Q", 2)), "byte 9: version must be 1, got 2"),
    "floats": (".idx", patch_bytes(17, b"\x06"), "byte 17: the code of the type .*, got 6"),
    "count": (
        ".idx",
        patch_bytes(18, struct.pack("<Q", 241)),
        r"the 241 sequences and .*\(byte 18\)",
    ),
    "cut off": (".idx", lambda original: original[:-1], "must have 4842 bytes.*got 4841"),
    "pointer": (
        ".idx",
        patch_bytes(POINTER_5_OFFSET, struct.pack("<q", 7)),
        f"byte {POINTER_5_OFFSET}: document 5 must begin at .*, got byte 7",
    ),
    "negative size": (
        ".idx",
        patch_bytes(HEADER.size + 4 * 5, struct.pack("<i", -1)),
        f"byte {HEADER.size + 4 * 5}: document 5 must have at least 0 tokens, got -1",
    ),
    "half the data": (".bin", lambda original: original[:-2], "must have 55478 bytes.*got 55476"),
}


@pytest.mark.parametrize(("extension", "damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_file_is_named_with_position(
    extension: str, damage: Callable[[bytes], bytes], message: str, tmp_path: Path
) -> None:
    for each in (".bin", ".idx"):
        content = (GOLDEN / f"data_uint16{each}").read_bytes()
        (tmp_path / f"x{each}").write_bytes(damage(content) if each == extension else content)
    with pytest.raises(UserError, match=message) as caught:
        IndexedTokens.open(tmp_path / "x")
    assert str(tmp_path / f"x{extension}") in str(caught.value)


@pytest.mark.parametrize("missing", [".bin", ".idx"])
def test_missing_file_is_named(missing: str, tmp_path: Path) -> None:
    other = ".idx" if missing == ".bin" else ".bin"
    (tmp_path / f"x.y{other}").write_bytes((GOLDEN / f"data_uint16{other}").read_bytes())
    with pytest.raises(UserError, match=rf"x\.y\{missing} does not exist.*without \.bin and .idx"):
        IndexedTokens.open(tmp_path / "x.y")


def test_index_without_documents_is_rejected(tmp_path: Path) -> None:
    head = HEADER.pack(b"MMIDIDX\x00\x00", 1, 8, 0, 1)
    (tmp_path / "x.idx").write_bytes(head + struct.pack("<q", 0))
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(UserError, match="byte 18: the index has no documents"):
        IndexedTokens.open(tmp_path / "x")
