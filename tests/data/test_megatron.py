"""Megatron's token files: read, refused when damaged, and written as the published builder does."""

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tokengrow.data.megatron import HEADER, IndexedTokens, export_store, write_indexed
from tokengrow.data.store import TokenStore
from tokengrow.data.tokenizer import Tokenizer
from tokengrow.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "H_mmap_seed1234"
FILES = {"uint16": 50277, "int32": 100000}
"""The published builder's choice of type, and a vocabulary that leads to it."""


@pytest.fixture(scope="module")
def documents() -> list[np.ndarray]:
    """The 240 documents that the published builder was given."""
    listed = json.loads((GOLDEN / "documents.json").read_text())["documents"]
    return [np.array(document) for document in listed]


@pytest.mark.parametrize("kind", FILES)
def test_every_document_is_read_as_it_was_written(kind: str, documents: list[np.ndarray]) -> None:
    files = IndexedTokens.open(GOLDEN / f"data_{kind}")
    assert len(files) == len(documents) == 240
    assert files.dtype == kind
    for number, document in enumerate(documents):
        found = files.tokens(number, number + 1).read(0, len(document))
        assert found.dtype == np.int64
        assert np.array_equal(found, document)
    assert max(int(document.max()) for document in documents) > 2**15  # no sign in uint16


@pytest.mark.parametrize("kind", FILES)
def test_documents_in_a_row_are_one_stream(kind: str, documents: list[np.ndarray]) -> None:
    tokens = IndexedTokens.open(GOLDEN / f"data_{kind}").tokens(100, 240)
    assert np.array_equal(tokens.read(0, len(tokens)), np.concatenate(documents[100:]))


@pytest.mark.parametrize(("kind", "vocab_size"), FILES.items())
@pytest.mark.parametrize("cut", [240, 7, 1])
def test_written_files_are_the_published_ones_byte_for_byte(
    kind: str, vocab_size: int, cut: int, documents: list[np.ndarray], tmp_path: Path
) -> None:
    groups = [documents[at : at + cut] for at in range(0, 240, cut)]
    pieces = [(np.concatenate(group), np.array([len(d) for d in group])) for group in groups]
    write_indexed(tmp_path / "mine", iter(pieces), vocab_size)
    for ending in (".bin", ".idx"):
        published = (GOLDEN / f"data_{kind}{ending}").read_bytes()
        assert (tmp_path / f"mine{ending}").read_bytes() == published


def test_a_vocabulary_of_65500_no_longer_goes_into_two_bytes(tmp_path: Path) -> None:
    for vocab_size, itemsize in ((65499, 2), (65500, 4)):
        write_indexed(tmp_path / str(itemsize), [(np.arange(6), np.array([2, 4]))], vocab_size)
        assert (tmp_path / f"{itemsize}.bin").stat().st_size == 6 * itemsize


def test_a_store_is_written_with_its_documents_and_tokenizer(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokengrow.data.megatron._CHUNK", 1000)  # documents lie across pieces
    prefixes = export_store(store, tmp_path / "out")
    assert [Path(prefix).name for prefix in prefixes] == [
        "train_text_document",
        "validation_text_document",
    ]
    for prefix, split in zip(prefixes, ("train", "validation"), strict=True):
        files, tokens = IndexedTokens.open(prefix), store.split(split)
        stream = files.tokens(0, len(files))
        assert np.array_equal(stream.read(0, len(stream)), tokens.read(0, len(tokens)))
        last = [stream.read(files.start(number + 1) - 1, 1)[0] for number in range(len(files))]
        assert set(last) == {store.end_of_text}
        assert len(files) == (tokens.read(0, len(tokens)) == store.end_of_text).sum()
    tokenizer = Tokenizer.from_file(tmp_path / "out" / "tokenizer.json")
    assert tokenizer.fingerprint == store.tokenizer().fingerprint


def test_a_loaders_worker_opens_the_files_anew() -> None:
    files = IndexedTokens.open(GOLDEN / "data_uint16")
    content = pickle.dumps(files)
    assert len(content) < 1000
    assert np.array_equal(pickle.loads(content).sizes, files.sizes)


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        for ending in (".bin", ".idx"):
            (tmp_path / f"{name}{ending}").write_bytes(
                (GOLDEN / f"data_uint16{ending}").read_bytes()
            )
    changed = bytearray((tmp_path / "c.bin").read_bytes())
    changed[-1] ^= 1
    (tmp_path / "c.bin").write_bytes(changed)
    a, b, c = (IndexedTokens.open(tmp_path / name).fingerprint for name in ("a", "b", "c"))
    assert a == b != c
    assert a != IndexedTokens.open(GOLDEN / "data_int32").fingerprint


def patched(at: int, content: bytes) -> Callable[[bytes], bytes]:
    return lambda whole: whole[:at] + content + whole[at + len(content) :]


POINTER_OF_5 = HEADER.size + 4 * 240 + 8 * 5

DAMAGES = {
    "another format": (".idx", patched(0, b"TNTIDX\0\0\0"), "its first 9 bytes are b'TNTIDX"),
    "empty": (".idx", lambda whole: b"", "its first 9 bytes are b''"),
    "half a header": (".idx", lambda whole: whole[:20], "no memory-mapped Megatron index"),
    "version": (".idx", patched(9, struct.pack("<Q", 2)), "byte 9: version 2 is not known"),
    "floats": (".idx", patched(17, b"\x06"), "byte 17: code 6 is no type of token ids"),
    "count": (".idx", patched(18, struct.pack("<Q", 241)), r"byte 18\) announces 241 sequences"),
    "cut off": (".idx", lambda whole: whole[:-1], "has 4841 bytes.*take 4842"),
    "pointer": (
        ".idx",
        patched(POINTER_OF_5, struct.pack("<q", 7)),
        f"byte {POINTER_OF_5}: document 5 begins at byte 7 ",
    ),
    "negative size": (
        ".idx",
        patched(HEADER.size + 4 * 5, struct.pack("<i", -1)),
        f"byte {HEADER.size + 4 * 5}: document 5 has -1 tokens",
    ),
    "half the data": (".bin", lambda whole: whole[:-2], "has 55476 bytes.*announces 55478"),
}


@pytest.mark.parametrize(("ending", "damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_named_with_the_place(
    ending: str, damage: Callable[[bytes], bytes], said: str, tmp_path: Path
) -> None:
    for each in (".bin", ".idx"):
        whole = (GOLDEN / f"data_uint16{each}").read_bytes()
        (tmp_path / f"x{each}").write_bytes(damage(whole) if each == ending else whole)
    with pytest.raises(UserError, match=said) as caught:
        IndexedTokens.open(tmp_path / "x")
    assert str(tmp_path / f"x{ending}") in str(caught.value)


@pytest.mark.parametrize("missing", [".bin", ".idx"])
def test_a_missing_file_is_named(missing: str, tmp_path: Path) -> None:
    there = ".idx" if missing == ".bin" else ".bin"
    (tmp_path / f"x.y{there}").write_bytes((GOLDEN / f"data_uint16{there}").read_bytes())
    with pytest.raises(UserError, match=rf"x\.y\{missing} does not exist.*without .bin and .idx"):
        IndexedTokens.open(tmp_path / "x.y")


def test_an_index_without_documents_is_refused(tmp_path: Path) -> None:
    head = HEADER.pack(b"MMIDIDX\x00\x00", 1, 8, 0, 1)
    (tmp_path / "x.idx").write_bytes(head + struct.pack("<q", 0))
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(UserError, match="holds no document"):
        IndexedTokens.open(tmp_path / "x")
