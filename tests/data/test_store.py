"""Tests of token stores: contents, resuming after a kill, and detection of damage."""

import errno
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tokengrow.data import store_writer
from tokengrow.data.corpus import HubCorpus, TextCorpus
from tokengrow.data.sequences import TokenArray
from tokengrow.data.store import TokenStore, build_store, prepare_store
from tokengrow.data.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from tokengrow.errors import UserError

SHARD_TOKENS = 500


@pytest.fixture
def corpus(tmp_path: Path) -> TextCorpus:
    """120 documents of different lengths, about 1,500 tokens in total."""
    file = tmp_path / "corpus.jsonl"
    texts = [f"document {n}: " + "so it goes, " * (n % 7) for n in range(120)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return TextCorpus(files=[str(file)], validation_fraction=0.2)


@pytest.fixture
def tokenizer(corpus: TextCorpus) -> Tokenizer:
    return train_tokenizer(TokenizerConfig(vocab_size=270), corpus)


@pytest.fixture
def store(corpus: TextCorpus, tokenizer: Tokenizer, tmp_path: Path) -> TokenStore:
    return build_store(
        corpus, tokenizer, tmp_path / "store", shard_tokens=SHARD_TOKENS, progress=False
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Return file name to content."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_split_is_documents_each_with_end_of_text(
    store: TokenStore, corpus: TextCorpus, tokenizer: Tokenizer
) -> None:
    for split in ("train", "validation"):
        expected = [
            token
            for text in corpus.documents(split)
            for token in [*tokenizer.encode(text), store.end_of_text]
        ]
        tokens = store.split(split)
        assert tokens.read(0, len(tokens)).tolist() == expected
    assert store.vocab_size == 270
    assert store.identity == corpus.identity()
    assert store.tokenizer().fingerprint == tokenizer.fingerprint


def test_shards_end_with_a_document(store: TokenStore) -> None:
    shards = sorted(store.folder.glob("train_*.bin"))
    assert len(shards) > 2
    for shard in shards:
        assert np.fromfile(shard, dtype="<u2")[-1] == store.end_of_text
    assert all(shard.stat().st_size >= 2 * SHARD_TOKENS for shard in shards[:-1])


def test_ranges_are_read_across_shards(store: TokenStore) -> None:
    tokens = store.split("train")
    stream = tokens.read(0, len(tokens))
    assert stream.dtype == np.int64
    for start in range(0, len(tokens) - 700, 97):
        assert np.array_equal(tokens.read(start, 700), stream[start : start + 700])
    assert len(tokens.read(len(tokens), 0)) == 0
    for start, length in ((-1, 1), (0, len(tokens) + 1), (len(tokens), 1), (0, -1)):
        with pytest.raises(IndexError):
            tokens.read(start, length)


def test_pickled_split_holds_paths_not_tokens(tmp_path: Path) -> None:
    np.arange(10**5, dtype="<u4").tofile(tmp_path / "a.bin")
    tokens = TokenArray([tmp_path / "a.bin"], [10**5], "<u4")
    tokens.read(0, 1)
    content = pickle.dumps(tokens)
    assert len(content) < 1000
    assert pickle.loads(content).read(70_000, 2).tolist() == [70_000, 70_001]


def test_large_vocabulary_takes_four_bytes(
    corpus: TextCorpus, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    values = json.loads(tokenizer.to_json())
    values["model"]["vocab"]["unreachable"] = 2**16
    (tmp_path / "large.json").write_text(json.dumps(values))
    large = Tokenizer.from_file(tmp_path / "large.json")
    store = build_store(corpus, large, tmp_path / "large", progress=False)
    tokens = store.split("train")
    assert (store.folder / "train_00000.bin").stat().st_size == 4 * len(tokens)
    first_document = tokenizer.encode(next(corpus.documents("train")))
    assert tokens.read(0, len(first_document)).tolist() == first_document


def test_fingerprint_depends_only_on_content(
    store: TokenStore, corpus: TextCorpus, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(Path(corpus.files[0]).read_bytes())
    copy = TextCorpus(files=[str(moved)], validation_fraction=0.2)
    other = build_store(
        copy, tokenizer, tmp_path / "other", shard_tokens=SHARD_TOKENS, progress=False
    )
    assert other.identity != store.identity and other.fingerprint == store.fingerprint


def test_empty_validation_split_is_allowed(
    corpus: TextCorpus, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    unsplit = TextCorpus(files=corpus.files, validation_fraction=0)
    store = build_store(unsplit, tokenizer, tmp_path / "store", progress=False)
    assert len(store.split("validation")) == 0


def test_complete_store_is_opened_unchanged(
    store: TokenStore, corpus: TextCorpus, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextCorpus, "documents", None)  # reading it again would fail
    again = build_store(corpus, tokenizer, store.folder, progress=False)
    assert again.fingerprint == store.fingerprint


def test_cache_has_one_store_per_source(
    corpus: TextCorpus, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    first = prepare_store(corpus, tokenizer, cache, progress=False)
    assert prepare_store(corpus, tokenizer, cache, progress=False).folder == first.folder
    with Path(corpus.files[0]).open("a") as file:
        file.write('{"text": "one more"}\n')
    assert prepare_store(corpus, tokenizer, cache, progress=False).folder != first.folder


KILLED_BUILD = """
import os, signal, sys
from pathlib import Path
from tokengrow import files
from tokengrow.data import store_writer
from tokengrow.data.corpus import HubCorpus, TextCorpus
from tokengrow.data.store import build_store
from tokengrow.data.tokenizer import Tokenizer

target, count = sys.argv[1], int(sys.argv[2])
def kill_after_count(function):
    def wrapped(*arguments):
        global count
        count -= 1
        if count < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return wrapped
if target == "rename":
    os.replace = kill_after_count(os.replace)
elif target == "append":
    store_writer._ShardWriter.append = kill_after_count(store_writer._ShardWriter.append)
corpus = TextCorpus(files=[sys.argv[3]], validation_fraction=0.2)
tokenizer = Tokenizer.from_file(sys.argv[4])
build_store(corpus, tokenizer, Path(sys.argv[5]), shard_tokens=500, progress=False)
"""


@pytest.mark.parametrize(
    ("target", "count"),
    [
        ("rename", 0),  # before the first progress.json
        ("append", 40),  # inside the second shard
        ("rename", 4),  # between a shard and the progress.json that names it
        ("append", 100),  # in the validation split
    ],
)
def test_killed_build_resumes_to_same_bytes(
    store: TokenStore,
    corpus: TextCorpus,
    tokenizer: Tokenizer,
    tmp_path: Path,
    target: str,
    count: int,
) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    killed = tmp_path / "killed"
    paths = [corpus.files[0], str(tmp_path / "tokenizer.json"), str(killed)]
    command = [sys.executable, "-c", KILLED_BUILD, target, str(count), *paths]
    assert subprocess.run(command, check=False).returncode == -9
    with pytest.raises(UserError, match=r"Unfinished|does not exist"):
        TokenStore.open(killed)

    build_store(corpus, tokenizer, killed, shard_tokens=SHARD_TOKENS, progress=False)
    assert contents(killed) == contents(store.folder)


def test_interrupt_at_any_rename_loses_nothing(
    store: TokenStore, corpus: TextCorpus, tokenizer: Tokenizer, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Interrupt every run after two renames, until one completes."""
    folder, allowed = tmp_path / "stopped", 1
    replace = os.replace
    runs = 0

    def limited_replace(*paths: Path) -> None:
        nonlocal allowed
        replace(*paths)
        allowed -= 1
        if allowed < 0:
            raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", limited_replace)
    while not (folder / "store.json").exists():
        allowed, runs = 1, runs + 1
        try:
            build_store(corpus, tokenizer, folder, shard_tokens=SHARD_TOKENS, progress=False)
        except KeyboardInterrupt:
            continue
    monkeypatch.undo()
    build_store(corpus, tokenizer, folder, shard_tokens=SHARD_TOKENS, progress=False)
    assert runs > 3 and contents(folder) == contents(store.folder)


def test_only_unfinished_shards_are_tokenised_again(
    corpus: TextCorpus, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    encode = Tokenizer.encode_batch

    def limited_encode(self: Tokenizer, texts: list[str]) -> list[list[int]]:
        if len(encoded) >= 60:
            raise KeyboardInterrupt
        encoded.extend(texts)
        return encode(self, texts)

    monkeypatch.setattr(store_writer, "CHARACTERS_PER_BATCH", 1)  # one document per batch
    monkeypatch.setattr(Tokenizer, "encode_batch", limited_encode)
    folder = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        build_store(corpus, tokenizer, folder, shard_tokens=SHARD_TOKENS, progress=False)
    finished = json.loads((folder / "progress.json").read_text())["splits"]["train"]["documents"]
    assert 0 < finished <= 60
    encoded.clear()
    with pytest.raises(KeyboardInterrupt):
        build_store(corpus, tokenizer, folder, shard_tokens=SHARD_TOKENS, progress=False)
    documents = list(corpus.documents("train"))
    assert documents[finished] in encoded
    assert not set(encoded) & set(documents[:finished])


@pytest.fixture
def parquet_files(tmp_path: Path) -> list[Path]:
    """Six Parquet files of 40 texts each, about 500 tokens, in row groups of 15."""
    (tmp_path / "dataset").mkdir()
    files = [tmp_path / "dataset" / f"{number}.parquet" for number in range(6)]
    for number, file in enumerate(files):
        texts = [f"text {number}.{row}" + ", and so on" * (row % 5) for row in range(40)]
        pq.write_table(pa.table({"text": texts}), file, row_group_size=15)
    return files


class TestStreaming:
    """Store of a streamed dataset, whose reading was interrupted."""

    @pytest.fixture
    def stream(self, parquet_files: list[Path]) -> HubCorpus:
        return HubCorpus(name=str(parquet_files[0].parent), validation_fraction=0.1)

    def test_interrupted_build_resumes_to_same_bytes(
        self, stream: HubCorpus, parquet_files: list[Path], tokenizer: Tokenizer, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """Resume while the files that were read before hold only zeros."""
        monkeypatch.setattr(
            store_writer, "CHARACTERS_PER_BATCH", 1
        )  # documents are written as read
        reference = tmp_path / "reference"
        build_store(stream, tokenizer, reference, shard_tokens=SHARD_TOKENS, progress=False)
        interrupted = tmp_path / "interrupted"
        originals = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in parquet_files}

        def damage(*files: Path) -> None:
            """Overwrite these files and restore the others; keep sizes and times.

            The store's source records sizes and times.
            """
            for file in parquet_files:
                content, time = originals[file]
                file.write_bytes(bytes(len(content)) if file in files else content)
                os.utime(file, ns=(time, time))

        damage(parquet_files[4])
        with pytest.raises(UserError, match=r"failed after record 160: .* resumes after"):
            build_store(stream, tokenizer, interrupted, shard_tokens=SHARD_TOKENS, progress=False)
        progress = json.loads((interrupted / "progress.json").read_text())["splits"]["train"]
        rows_read = progress["place"]["read"]
        assert len(progress["shards"]) > 1 and 80 < rows_read < 160

        damage(parquet_files[1], parquet_files[5])  # the position is in the third or fourth file
        with pytest.raises(UserError, match=r"failed after record 200: "):
            build_store(stream, tokenizer, interrupted, shard_tokens=SHARD_TOKENS, progress=False)
        damage()
        build_store(stream, tokenizer, interrupted, shard_tokens=SHARD_TOKENS, progress=False)
        assert contents(interrupted) == contents(reference)


def test_store_of_other_source_is_not_overwritten(
    store: TokenStore, corpus: TextCorpus, tokenizer: Tokenizer
) -> None:
    before = contents(store.folder)
    other = train_tokenizer(TokenizerConfig(vocab_size=260), corpus)
    with pytest.raises(UserError, match=r"was made from another tokenizer\. Choose another out="):
        build_store(corpus, other, store.folder, progress=False)
    with Path(corpus.files[0]).open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(UserError, match=r"was made from another corpus\. Choose another out="):
        build_store(corpus, tokenizer, store.folder, progress=False)
    assert contents(store.folder) == before


def test_unfinished_store_of_other_source_is_kept(
    store: TokenStore, corpus: TextCorpus, tokenizer: Tokenizer
) -> None:
    record = json.loads((store.folder / "store.json").read_text())
    (store.folder / "store.json").unlink()
    splits = {"train": {"documents": 0, "done": False, "shards": []}}
    progress = {"source": record["source"], "splits": {**splits, "validation": splits["train"]}}
    (store.folder / "progress.json").write_text(json.dumps(progress))
    before = contents(store.folder)
    other = TextCorpus(files=corpus.files, validation_fraction=0.3)
    with pytest.raises(UserError, match="was started from another corpus"):
        build_store(other, tokenizer, store.folder, shard_tokens=SHARD_TOKENS, progress=False)
    with pytest.raises(UserError, match=r"was started with shard_tokens=500, got 67108864\."):
        build_store(corpus, tokenizer, store.folder, progress=False)
    assert contents(store.folder) == before


def test_folder_with_other_files_is_rejected(
    corpus: TextCorpus, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("precious")
    with pytest.raises(
        UserError, match=r"out must be a new or empty folder, .* other files\. Choose"
    ):
        build_store(corpus, tokenizer, tmp_path / "thesis", progress=False)
    with pytest.raises(
        UserError, match=r"out must be a folder, got .*, a file\. Choose another out="
    ):
        build_store(corpus, tokenizer, Path(corpus.files[0]), progress=False)
    assert list(contents(tmp_path / "thesis")) == ["chapter.txt"]


@pytest.mark.parametrize("content", ["", '{"text": "fine"}\n' * 50 + "{broken\n"])
def test_malformed_text_leaves_no_files(tokenizer: Tokenizer, tmp_path: Path, content: str) -> None:
    (tmp_path / "wrong.jsonl").write_text(content)
    corpus = TextCorpus(files=[str(tmp_path / "wrong.jsonl")], validation_fraction=0)
    with pytest.raises(UserError, match=r"in its train split, got no text|wrong.jsonl, line 51"):
        build_store(corpus, tokenizer, tmp_path / "store", shard_tokens=10, progress=False)
    assert not (tmp_path / "store").exists()


def test_two_processes_report_same_malformed_text(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.jsonl").write_text("{broken\n")
    corpus = TextCorpus(files=[str(tmp_path / "broken.jsonl")])
    discard = store_writer._discard

    def delayed_discard(*arguments: Any) -> None:
        time.sleep(0.2)  # until the other process waits for the lock
        discard(*arguments)

    monkeypatch.setattr(store_writer, "_discard", delayed_discard)

    def error_message(_: int) -> str:
        with pytest.raises(UserError) as error:
            build_store(corpus, tokenizer, tmp_path / "out", progress=False)
        return str(error.value)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(error_message, range(2))
    assert first == second and "line 1: not JSON" in first
    assert not (tmp_path / "out").exists()


def test_missing_store_names_remedy(store: TokenStore, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"Not a token store: .*absent/store.json does not exist\. Make"
    ):
        TokenStore.open(tmp_path / "absent")
    (store.folder / "store.json").unlink()
    with pytest.raises(UserError, match=r"Not a token store: .*store.json"):
        TokenStore.open(store.folder)
    (store.folder / "progress.json").write_text("{}")
    with pytest.raises(UserError, match=r"Unfinished token store: .* Repeat the `tokengrow data`"):
        TokenStore.open(store.folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"splits": {"train": [1]}}'])
def test_malformed_record_is_named(store: TokenStore, content: str) -> None:
    (store.folder / "store.json").write_text(content)
    with pytest.raises(UserError, match=r"Damaged token store: .*store.json"):
        TokenStore.open(store.folder)


def test_truncated_or_missing_shard_is_named_at_opening(store: TokenStore) -> None:
    shard = store.folder / "train_00001.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train_00001.bin has \d+ bytes instead of \d+"):
        TokenStore.open(store.folder)
    shard.unlink()
    with pytest.raises(UserError, match=r"train_00001.bin is missing"):
        TokenStore.open(store.folder)


def test_verify_finds_flipped_bit(store: TokenStore) -> None:
    store.verify()
    shard = store.folder / "validation_00000.bin"
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content)
    damaged = TokenStore.open(store.folder)  # sizes are unchanged
    with pytest.raises(UserError, match=r"validation_00000.bin must have SHA-256"):
        damaged.verify()


class TestDamagedWhileInUse:
    """Store that is damaged after opening: the error names the file and the byte."""

    def test_truncated_shard(self, store: TokenStore) -> None:
        tokens = store.split("train")
        tokens.read(0, len(tokens))  # every shard is open
        shard = store.folder / "train_00001.bin"
        os.truncate(shard, 601)
        first = tokens.read(0, SHARD_TOKENS)
        assert len(first) == SHARD_TOKENS, "the other shards are still readable"
        with pytest.raises(UserError, match=r"Token file .*train_00001.bin ends at byte 601, but"):
            tokens.read(0, len(tokens))

    def test_missing_shard(self, store: TokenStore) -> None:
        tokens = store.split("validation")
        (store.folder / "validation_00000.bin").unlink()
        with pytest.raises(
            UserError, match=r"validation_00000.bin cannot be read \(No such file .*\. Restore it"
        ):
            tokens.read(0, 1)

    def test_failing_disk(self, store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
        def failing_read(*_: object) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "preadv", failing_read)
        with pytest.raises(UserError, match=r"train_00000.bin cannot be read \(Input/output error"):
            store.split("train").read(0, 1)

    def test_id_outside_vocabulary(self, store: TokenStore) -> None:
        tokens = store.split("train")
        with (store.folder / "train_00000.bin").open("r+b") as file:
            file.seek(21)
            file.write(b"\xff")
        assert len(tokens.read(0, 10)) == 10
        with pytest.raises(
            UserError,
            match=r"train_00000.bin byte 20: token id 65\d+ is outside .* of 270\. Restore",
        ):
            tokens.read(3, 30)


@contextmanager
def unprivileged_user() -> Iterator[None]:
    """Drop root's privilege to read every file."""
    is_root = not os.geteuid()
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@pytest.mark.fault("a token shard may not be read", "its permissions", "refused, the file named")
def test_unreadable_shard_is_named_at_opening(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (store.folder / "train_00001.bin").chmod(0)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # only the user may read the folders above
    with (
        unprivileged_user(),
        pytest.raises(UserError, match=r"train_00001.bin is not readable\. Change its permissions"),
    ):
        TokenStore.open(store.folder.relative_to(tmp_path))


def test_open_files_are_limited(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.bin" for number in range(600)]
    for number, file in enumerate(files):
        np.full(2, number, dtype="<u2").tofile(file)
    tokens = TokenArray(files, [2] * 600, "<u2")
    before = len(os.listdir("/dev/fd"))
    assert np.array_equal(tokens.read(0, 1200), np.repeat(np.arange(600), 2))
    assert np.array_equal(tokens.read(0, 4), [0, 0, 1, 1])  # closed since then
    assert len(os.listdir("/dev/fd")) - before <= 256


def test_progress_is_shown_on_stderr_unless_disabled(
    corpus: TextCorpus, tokenizer: Tokenizer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    build_store(corpus, tokenizer, tmp_path / "silent", progress=False)
    assert capfd.readouterr() == ("", "")
    build_store(corpus, tokenizer, tmp_path / "shown")
    shown = capfd.readouterr()
    assert shown.out == "" and "tokenising train" in shown.err and "tokens/s" in shown.err
