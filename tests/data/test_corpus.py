"""What a corpus yields, in which order, to which split, and what it says of wrong input."""

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

from tokengrow.data.corpus import CORPORA, BrokenOffError, HubCorpus, StdlibCorpus, TextCorpus
from tokengrow.errors import UserError


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths start in the test's folder, and nobody asks the network."""
    monkeypatch.chdir(tmp_path)

    def refuse(*address: object, **_: object) -> None:
        raise AssertionError(f"asked the network for {address}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def train(*files: str, **options: object) -> list[str]:
    """All documents of some files."""
    corpus = TextCorpus(files=list(files), validation_fraction=0, **options)  # type: ignore[arg-type]
    return list(corpus.documents("train"))


def write_lines(name: str, *records: object) -> None:
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))


def test_plain_text_is_one_document_per_file() -> None:
    Path("b.txt").write_text("second\n\nfile\n")
    Path("a.md").write_text("# first\n")
    assert train("b.txt", "a.md") == ["second\n\nfile\n", "# first\n"]


def test_json_lines_array_and_parquet_are_one_document_per_record() -> None:
    write_lines("a.jsonl", {"text": "one", "n": 1}, {"text": "two"})
    Path("b.json").write_text('[{"text": "three"}, {"text": "four"}]')
    pq.write_table(pa.table({"text": ["five", "six"], "n": [1, 2]}), "c.parquet")
    assert train("a.jsonl", "b.json", "c.parquet") == ["one", "two", "three", "four", "five", "six"]


def test_compressed_files_are_read_as_their_content() -> None:
    Path("a.txt.gz").write_bytes(gzip.compress(b"zipped", mtime=0))
    Path("b.txt.zst").write_bytes(zstandard.compress(b"dense"))
    Path("c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n', mtime=0))
    Path("d.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "two"}\n'))
    assert train("*.gz", "*.zst") == ["zipped", "one", "dense", "two"]


def test_a_folder_gives_its_known_files_by_path() -> None:
    for name in ("z.txt", "a/b.txt", "a/.hidden.txt", "picture.png"):
        Path("books", name).parent.mkdir(parents=True, exist_ok=True)
        Path("books", name).write_text(name)
    assert train("books") == ["a/b.txt", "z.txt"]


def test_a_file_that_two_patterns_name_is_read_once() -> None:
    Path("a.txt").write_text("once")
    assert train("a.txt", "*.txt", ".") == ["once"]


def test_a_name_with_glob_characters_is_a_name_first() -> None:
    Path("a[1].txt").write_text("brackets")
    assert train("a[1].txt") == ["brackets"]


def test_empty_documents_and_files_are_left_out() -> None:
    Path("a.txt").write_text("")
    Path("b.jsonl").write_text("")
    write_lines("c.jsonl", {"text": ""}, {"text": "kept"})
    assert train("a.txt", "b.jsonl", "c.jsonl") == ["kept"]


def test_validation_files_are_the_validation_split_and_never_trained_on() -> None:
    Path("a.txt").write_text("train")
    Path("b.txt").write_text("validation")
    corpus = TextCorpus(files=["*.txt"], validation_files=["b.txt"], validation_fraction=0.99)
    assert list(corpus.documents("train")) == ["train"]
    assert list(corpus.documents("validation")) == ["validation"]


def test_held_out_documents_stay_held_out_when_others_come() -> None:
    texts = [f"document {n}" for n in range(1000)]
    write_lines("a.jsonl", *({"text": text} for text in texts))
    before = TextCorpus(files=["a.jsonl"], validation_fraction=0.1)
    held_out = list(before.documents("validation"))
    assert 70 < len(held_out) < 130
    assert sorted([*before.documents("train"), *held_out]) == sorted(texts)

    write_lines("b.jsonl", *({"text": f"more {n}"} for n in range(100)))
    after = TextCorpus(files=["b.jsonl", "a.jsonl"], validation_fraction=0.1)
    assert set(held_out) < set(after.documents("validation"))


def test_fraction_zero_means_no_validation_split() -> None:
    Path("a.txt").write_text("all of it")
    assert not list(TextCorpus(files=["a.txt"], validation_fraction=0).documents("validation"))


def test_identity_is_json_and_changes_with_a_file() -> None:
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
        ("a.png", b"", "data.files: a.png has an unknown ending"),
    ],
)
def test_a_malformed_file_is_named_with_the_place(
    name: str, content: bytes, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    Path(name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        train(name)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # one sentence, and no noise of the reader beside it


def test_a_parquet_file_without_the_column_names_its_columns() -> None:
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet, record 1: no text under 'text'.*has body, n"):
        train("a.parquet")
    assert train("a.parquet", text_key="body") == ["x"]


@pytest.mark.parametrize("pattern", ["absent.txt", "*.absent", "empty"])
def test_a_pattern_that_matches_nothing_is_named(pattern: str) -> None:
    Path("empty").mkdir()
    with pytest.raises(UserError, match=re.escape(f"data.files: {pattern!r} names no text")):
        train(pattern)


def test_a_share_outside_its_range_is_refused() -> None:
    with pytest.raises(UserError, match=r"data.validation_fraction is 1"):
        StdlibCorpus(validation_fraction=1)


def test_the_standard_library_has_two_splits_without_tests() -> None:
    corpus = StdlibCorpus()
    names = [name for name, _ in corpus.identity()["files"]]
    assert "argparse.py" in names and "json/decoder.py" in names
    assert not [name for name in names if "/test" in name or "site-packages" in name]
    train_documents = list(corpus.documents("train"))
    validation = list(corpus.documents("validation"))
    assert 0 < len(validation) < 0.1 * len(train_documents)
    assert not set(validation) & set(train_documents)


def test_the_same_library_elsewhere_is_the_same_corpus(
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


def test_a_python_without_library_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"data: no \.py file in"):
        list(StdlibCorpus().documents("train"))


def test_a_local_folder_is_read_like_a_hub_dataset() -> None:
    Path("set").mkdir()
    write_lines("set/train.jsonl", {"text": "one"}, {"text": "two"})
    write_lines("set/validation.jsonl", {"text": "three"})
    own = HubCorpus(name="set", validation_split="validation")
    assert list(own.documents("train")) == ["one", "two"]
    assert list(own.documents("validation")) == ["three"]
    assert len(own.identity()["files"]) == 2

    held_out = HubCorpus(name="set", validation_fraction=0)
    assert list(held_out.documents("train")) == ["one", "two"]
    with pytest.raises(UserError, match=r"record 1: no text under 'body'"):
        list(HubCorpus(name="set", text_key="body").documents("train"))
    with pytest.raises(UserError, match=r"data.name: cannot load 'set' .* split oops\): Bad split"):
        list(HubCorpus(name="set", split="oops").documents("train"))


@pytest.fixture
def shelf() -> list[Path]:
    """A folder of four Parquet files: 25 texts each, in row groups of 10."""
    Path("shelf").mkdir()
    files = [Path(f"shelf/{number}.parquet") for number in range(4)]
    for number, file in enumerate(files):
        texts = [f"text {25 * number + row}" for row in range(25)]
        pq.write_table(pa.table({"text": texts}), file, row_group_size=10)
    return files


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_a_stream_goes_on_behind_any_of_its_documents(shelf: list[Path], fraction: float) -> None:
    corpus = HubCorpus(name="shelf", validation_fraction=fraction)
    read = list(corpus.resume("train", 0, None))
    texts = [text for text, _ in read]
    assert texts == list(corpus.documents("train")) and len(texts) > 50
    for done in range(1, len(texts), 3):
        place = json.loads(json.dumps(read[done - 1][1]))
        assert [text for text, _ in corpus.resume("train", done, place)] == texts[done:]
    assert list(corpus.resume("train", len(texts), read[-1][1])) == []


def test_a_stream_that_goes_on_opens_no_file_that_it_has_passed(shelf: list[Path]) -> None:
    corpus = HubCorpus(name="shelf", validation_fraction=0)
    read = list(corpus.resume("train", 0, None))
    for passed in shelf[1:3]:  # all but the first, which tells what the columns are
        passed.write_bytes(b"no Parquet")
    rest = [text for text, _ in corpus.resume("train", 90, read[89][1])]
    assert rest == [text for text, _ in read[90:]]


def test_a_source_that_breaks_off_is_named_with_the_place(shelf: list[Path]) -> None:
    corpus = HubCorpus(name="shelf", validation_fraction=0)
    shelf[2].write_bytes(b"no Parquet")
    documents = corpus.documents("train")
    message = r"shelf, split train, cannot be read behind record 50: .*: check the network and"
    with pytest.raises(BrokenOffError, match=message) as caught:
        for _ in range(51):
            next(documents)
    assert "\n" not in str(caught.value)


def test_places_of_another_version_of_the_library_are_counted_to(shelf: list[Path]) -> None:
    corpus = HubCorpus(name="shelf", validation_fraction=0)
    read = list(corpus.resume("train", 0, None))
    foreign = read[49][1] | {"datasets": "1.0", "state": {"unknown": 1}}
    assert next(corpus.resume("train", 50, foreign)) == read[50]


def test_a_record_behind_a_place_is_named_by_its_number(shelf: list[Path]) -> None:
    corpus = HubCorpus(name="shelf", validation_fraction=0)
    place = list(corpus.resume("train", 0, None))[59][1]
    pq.write_table(pa.table({"text": ["fine", None]}), shelf[3])
    with pytest.raises(UserError, match=r"split train, record 77: no text under 'text'"):
        list(corpus.resume("train", 60, place))


def test_what_has_no_places_is_read_again_up_to_where_it_was(shelf: list[Path]) -> None:
    whole = HubCorpus(name="shelf", validation_fraction=0, streaming=False)
    texts = list(whole.documents("train"))
    assert list(whole.resume("train", 97, None)) == [(text, None) for text in texts[97:]]


def test_every_kind_of_corpus_has_a_name() -> None:
    assert set(CORPORA) == {"stdlib", "text", "hub"}
