"""Tests of corpora: documents, their order and split, and errors for wrong input."""

import gzip
import json
import re
import socket
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tokengrow.data.corpus import (
    CORPORA,
    HubCorpus,
    SourceInterruptedError,
    StdlibCorpus,
    TextCorpus,
)
from tokengrow.errors import UserError


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in the test's folder, and fail on network access."""
    monkeypatch.chdir(tmp_path)

    def refuse(*address: object, **_: object) -> None:
        raise AssertionError(f"network access to {address}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def train_documents(*files: str, **options: object) -> list[str]:
    """Return all documents of some files."""
    corpus = TextCorpus(files=list(files), validation_fraction=0, **options)  # type: ignore[arg-type]
    return list(corpus.documents("train"))


def write_json_lines(name: str, *records: object) -> None:
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))


def test_plain_text_is_one_document_per_file() -> None:
    Path("b.txt").write_text("second\n\nfile\n")
    Path("a.md").write_text("# first\n")
    assert train_documents("b.txt", "a.md") == ["second\n\nfile\n", "# first\n"]


def test_json_and_parquet_are_one_document_per_record() -> None:
    write_json_lines("a.jsonl", {"text": "one", "n": 1}, {"text": "two"})
    Path("b.json").write_text('[{"text": "three"}, {"text": "four"}]')
    pq.write_table(pa.table({"text": ["five", "six"], "n": [1, 2]}), "c.parquet")
    assert train_documents("a.jsonl", "b.json", "c.parquet") == [
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
    ]


def test_compressed_files_are_decompressed() -> None:
    Path("a.txt.gz").write_bytes(gzip.compress(b"zipped", mtime=0))
    Path("b.txt.zst").write_bytes(zstandard.compress(b"dense"))
    Path("c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n', mtime=0))
    Path("d.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "two"}\n'))
    assert train_documents("*.gz", "*.zst") == ["zipped", "one", "dense", "two"]


def test_folder_gives_files_of_known_extensions_by_path() -> None:
    for name in ("z.txt", "a/b.txt", "a/.hidden.txt", "picture.png"):
        Path("books", name).parent.mkdir(parents=True, exist_ok=True)
        Path("books", name).write_text(name)
    assert train_documents("books") == ["a/b.txt", "z.txt"]


def test_file_named_by_two_patterns_is_read_once() -> None:
    Path("a.txt").write_text("once")
    assert train_documents("a.txt", "*.txt", ".") == ["once"]


def test_existing_name_with_glob_characters_is_no_pattern() -> None:
    Path("a[1].txt").write_text("brackets")
    assert train_documents("a[1].txt") == ["brackets"]


def test_empty_documents_and_files_are_skipped() -> None:
    Path("a.txt").write_text("")
    Path("b.jsonl").write_text("")
    write_json_lines("c.jsonl", {"text": ""}, {"text": "kept"})
    assert train_documents("a.txt", "b.jsonl", "c.jsonl") == ["kept"]


def test_validation_files_are_excluded_from_training() -> None:
    Path("a.txt").write_text("train")
    Path("b.txt").write_text("validation")
    corpus = TextCorpus(files=["*.txt"], validation_files=["b.txt"], validation_fraction=0.99)
    assert list(corpus.documents("train")) == ["train"]
    assert list(corpus.documents("validation")) == ["validation"]


def test_held_out_documents_stay_held_out_in_larger_corpus() -> None:
    texts = [f"document {n}" for n in range(1000)]
    write_json_lines("a.jsonl", *({"text": text} for text in texts))
    before = TextCorpus(files=["a.jsonl"], validation_fraction=0.1)
    held_out = list(before.documents("validation"))
    assert 70 < len(held_out) < 130
    assert sorted([*before.documents("train"), *held_out]) == sorted(texts)

    write_json_lines("b.jsonl", *({"text": f"more {n}"} for n in range(100)))
    after = TextCorpus(files=["b.jsonl", "a.jsonl"], validation_fraction=0.1)
    assert set(held_out) < set(after.documents("validation"))


def test_fraction_zero_gives_empty_validation_split() -> None:
    Path("a.txt").write_text("all of it")
    assert not list(TextCorpus(files=["a.txt"], validation_fraction=0).documents("validation"))


def test_identity_is_json_and_changes_with_file() -> None:
    Path("a.txt").write_text("before")
    corpus = TextCorpus(files=["a.txt"])
    before = corpus.identity()
    assert json.loads(json.dumps(before)) == before == corpus.identity()
    Path("a.txt").write_text("after that")
    assert corpus.identity() != before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "y"\n', "data.files: .*a.jsonl, line 3: not JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "data.files: .*a.jsonl, line 1: not JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', "data.files: .*a.jsonl, line 1: not JSON"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "x"}\n{"te\n', mtime=0),
            "a.jsonl.gz, line 2: not JSON",
        ),
        ("a.jsonl.zst", zstandard.compress(b'{"text": "x"}\n{"te\n'), "a.jsonl.zst, line 2: not"),
        ("a.json", b'[{"text": "x"},\n {"text": "y"]', "data.files: .*a.json, line 2:"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', "data.text_key: .*, line 2: no text under"),
        ("a.jsonl", b'{"text": 5}\n', "data.text_key: .*, line 1: 'text' holds 5, not text"),
        ("a.jsonl.zst", b"no", "data.files: cannot read .*a.jsonl.zst: zstd"),
        ("a.txt.gz", b"no", "data.files: cannot read .*a.txt.gz: Not a gzipped file"),
        ("a.txt", b"good \xff", "data.files: .*a.txt, byte 5: not UTF-8"),
        ("a.parquet", b"no", "data.files: cannot read .*a.parquet: Parquet"),
        ("a.png", b"", r"data.files must .* known extensions, got a.png\. Known are \.txt,"),
    ],
)
def test_malformed_file_is_named_with_position(
    name: str, content: bytes, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    Path(name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        train_documents(name)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # one line, and no output of the reader


def test_error_for_missing_parquet_column_lists_columns() -> None:
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet, record 1: no text under 'text'.*has body, n"):
        train_documents("a.parquet")
    assert train_documents("a.parquet", text_key="body") == ["x"]


@pytest.mark.parametrize("pattern", ["absent.txt", "*.absent", "empty"])
def test_pattern_without_matches_is_named(pattern: str) -> None:
    Path("empty").mkdir()
    with pytest.raises(
        UserError, match=re.escape(f"data.files must name text files, got {pattern!r}")
    ):
        train_documents(pattern)


def test_validation_fraction_out_of_range_is_rejected() -> None:
    with pytest.raises(
        UserError, match=r"data.validation_fraction must be .* less than 1, got 1\."
    ):
        StdlibCorpus(validation_fraction=1)


def test_stdlib_has_two_splits_without_tests() -> None:
    corpus = StdlibCorpus()
    names = [name for name, _ in corpus.identity()["files"]]
    assert "argparse.py" in names and "json/decoder.py" in names
    assert not [name for name in names if "/test" in name or "site-packages" in name]
    train = list(corpus.documents("train"))
    validation = list(corpus.documents("validation"))
    assert 0 < len(validation) < 0.1 * len(train)
    assert not set(validation) & set(train)


def test_same_stdlib_in_other_folder_has_same_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identities = []
    for root in (tmp_path / "here", tmp_path / "there"):
        (root / "package").mkdir(parents=True)
        (root / "package" / "module.py").write_text("x = 1\n")
        (root / "broken.py").write_bytes(b"\xff")  # not UTF-8: skipped
        monkeypatch.setattr(sysconfig, "get_path", lambda name, root=root: str(root))
        corpus = StdlibCorpus(validation_fraction=0)
        identities.append(corpus.identity())
        assert list(corpus.documents("train")) == ["x = 1\n"]
    assert identities[0] == identities[1]


def test_python_without_library_files_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"data=stdlib needs .*, but .* has no \.py file"):
        list(StdlibCorpus().documents("train"))


def test_local_folder_is_read_like_hub_dataset() -> None:
    Path("set").mkdir()
    write_json_lines("set/train.jsonl", {"text": "one"}, {"text": "two"})
    write_json_lines("set/validation.jsonl", {"text": "three"})
    separate = HubCorpus(name="set", validation_split="validation")
    assert list(separate.documents("train")) == ["one", "two"]
    assert list(separate.documents("validation")) == ["three"]
    assert len(separate.identity()["files"]) == 2

    held_out = HubCorpus(name="set", validation_fraction=0)
    assert list(held_out.documents("train")) == ["one", "two"]
    with pytest.raises(UserError, match=r"record 1: no text under 'body'"):
        list(HubCorpus(name="set", text_key="body").documents("train"))
    with pytest.raises(UserError, match=r"data.name: cannot load 'set' .* split oops\): Bad split"):
        list(HubCorpus(name="set", split="oops").documents("train"))


@pytest.fixture
def parquet_files() -> list[Path]:
    """Four Parquet files in the folder `dataset`: 25 texts each, in row groups of 10."""
    Path("dataset").mkdir()
    files = [Path(f"dataset/{number}.parquet") for number in range(4)]
    for number, file in enumerate(files):
        texts = [f"text {25 * number + row}" for row in range(25)]
        pq.write_table(pa.table({"text": texts}), file, row_group_size=10)
    return files


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_stream_resumes_after_any_document(parquet_files: list[Path], fraction: float) -> None:
    corpus = HubCorpus(name="dataset", validation_fraction=fraction)
    read = list(corpus.resume("train", 0, None))
    texts = [text for text, _ in read]
    assert texts == list(corpus.documents("train")) and len(texts) > 50
    for done in range(1, len(texts), 3):
        position = json.loads(json.dumps(read[done - 1][1]))
        assert [text for text, _ in corpus.resume("train", done, position)] == texts[done:]
    assert list(corpus.resume("train", len(texts), read[-1][1])) == []


def test_resumed_stream_skips_files_read_before(parquet_files: list[Path]) -> None:
    corpus = HubCorpus(name="dataset", validation_fraction=0)
    read = list(corpus.resume("train", 0, None))
    for passed in parquet_files[1:3]:  # not the first, from which the columns are read
        passed.write_bytes(b"no Parquet")
    rest = [text for text, _ in corpus.resume("train", 90, read[89][1])]
    assert rest == [text for text, _ in read[90:]]


def test_interrupted_source_is_named_with_position(parquet_files: list[Path]) -> None:
    corpus = HubCorpus(name="dataset", validation_fraction=0)
    parquet_files[2].write_bytes(b"no Parquet")
    documents = corpus.documents("train")
    message = r"reading dataset, split train, failed after record 50: .*\. Check the network and"
    with pytest.raises(SourceInterruptedError, match=message) as caught:
        for _ in range(51):
            next(documents)
    assert "\n" not in str(caught.value)


def test_position_of_other_library_version_is_skipped_to(parquet_files: list[Path]) -> None:
    corpus = HubCorpus(name="dataset", validation_fraction=0)
    read = list(corpus.resume("train", 0, None))
    other_version = read[49][1] | {"datasets": "1.0", "state": {"unknown": 1}}
    assert next(corpus.resume("train", 50, other_version)) == read[50]


def test_record_after_resuming_is_named_by_number(parquet_files: list[Path]) -> None:
    corpus = HubCorpus(name="dataset", validation_fraction=0)
    position = list(corpus.resume("train", 0, None))[59][1]
    pq.write_table(pa.table({"text": ["fine", None]}), parquet_files[3])
    with pytest.raises(UserError, match=r"split train, record 77: no text under 'text'"):
        list(corpus.resume("train", 60, position))


def test_source_without_positions_is_read_from_start(parquet_files: list[Path]) -> None:
    corpus = HubCorpus(name="dataset", validation_fraction=0, streaming=False)
    texts = list(corpus.documents("train"))
    assert list(corpus.resume("train", 97, None)) == [(text, None) for text in texts[97:]]


def test_every_corpus_class_has_a_name() -> None:
    assert set(CORPORA) == {"stdlib", "text", "hub"}
