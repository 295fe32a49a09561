"""Writing a token store, shard by shard, so that a killed process loses one shard at most."""

import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tokengrow.data.corpus import BrokenOffError, Corpus, Split
from tokengrow.data.store_record import (
    MARKER,
    PROGRESS,
    SPLITS,
    TOKENIZER,
    Shard,
    Source,
    StoreRecord,
    plain,
    token_dtype,
)
from tokengrow.data.tokenizer import Tokenizer
from tokengrow.errors import UserError
from tokengrow.files import TEMPORARY, directory_lock, rename_durably, write_atomically

BATCH_CHARACTERS = 2**22
"""Text handed to the tokenizer at once: enough documents to keep many cores busy."""
TOKENISING = 2
"""Batches with the tokenizer at a time: the second keeps the cores busy where the first ends."""


@dataclass
class _SplitState:
    """How far one split is: what its finished shards hold."""

    documents: int = 0
    done: bool = False
    shards: list[Shard] = field(default_factory=list)
    place: Any = None
    """Where the corpus goes on behind them, if it says so: see `Corpus.resume`."""


@dataclass
class _Job:
    """A store in the making; on disk it is ``progress.json`` and the shards named in it."""

    folder: Path
    source: Source
    splits: dict[str, _SplitState]

    def save(self) -> None:
        splits = {split: asdict(state) for split, state in self.splits.items()}
        values = {"source": asdict(self.source), "splits": splits}
        write_atomically(self.folder / PROGRESS, json.dumps(values).encode())


def write_store(
    corpus: Corpus, tokenizer: Tokenizer, folder: Path, *, shard_tokens: int, progress: bool
) -> None:
    """Leaves a complete store in the folder; see ``tokengrow.data.store.build_store``."""
    if shard_tokens < 1:
        raise UserError(f"data.shard_tokens is {shard_tokens}: give at least 1")
    identity = plain(corpus.identity())  # before anything is made: it refuses missing files
    source = Source(identity=identity, tokenizer=tokenizer.fingerprint, shard_tokens=shard_tokens)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out: {folder} is a file: choose another out=")
    is_new_folder = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with directory_lock(folder):
        if not folder.exists():  # a process that held it before has taken back what it wrote
            folder.mkdir(parents=True)
            is_new_folder = True
        if (folder / MARKER).is_file():
            _check_finished(folder, source)
            return
        job, resumed = _begin(folder, source)
        try:
            with _bar(progress) as bar:
                for split in SPLITS:
                    _write_split(job, corpus, tokenizer, split, bar)
            if not job.splits["train"].documents:
                raise UserError(
                    "data: the train split has no text: check data and its held-out share"
                )
        except UserError as error:
            # Wrong input leaves nothing behind. What an earlier call finished stays, and what was
            # read before a source broke off: it was right, and the reason may be passing.
            if not resumed and not isinstance(error, BrokenOffError):
                _discard(folder, is_new_folder)
            raise
        _finish(job, tokenizer)


def _check_finished(folder: Path, source: Source) -> None:
    """Refuses to give out a finished store of another source."""
    record = StoreRecord.load(folder)
    _check_same(folder, "made", record.source, source)
    (folder / PROGRESS).unlink(missing_ok=True)  # killed between the marker and this


def _check_same(folder: Path, verb: str, found: Source, wanted: Source) -> None:
    """Raises UserError unless both sources give the same tokens."""
    for what, same in (
        ("corpus", found.identity == wanted.identity),
        ("tokenizer", found.tokenizer == wanted.tokenizer),
    ):
        if not same:
            raise UserError(
                f"out: the token store in {folder} was {verb} from another {what}: choose another "
                "out=, or delete that folder"
            )


def _begin(folder: Path, source: Source) -> tuple[_Job, bool]:
    """A new job, or the one that an earlier process left in the folder (then True)."""
    if (folder / PROGRESS).is_file():
        return _resume(folder, source), True
    if any(not path.name.endswith(TEMPORARY) for path in folder.iterdir()):
        raise UserError(f"out: {folder} is not empty and no token store: choose another out=")
    job = _Job(folder, source, {split: _SplitState() for split in SPLITS})
    job.save()
    return job, False


def _resume(folder: Path, source: Source) -> _Job:
    """The job recorded in ``progress.json``, its shards checked by size."""
    values = json.loads((folder / PROGRESS).read_bytes())
    found = Source(**values["source"])
    _check_same(folder, "begun", found, source)
    if found.shard_tokens != source.shard_tokens:
        raise UserError(
            f"out: the token store in {folder} was begun with shard_tokens={found.shard_tokens}: "
            "give the same, choose another out=, or delete that folder"
        )
    splits = {}
    for split, state in values["splits"].items():
        shards = [Shard(**shard) for shard in state["shards"]]
        for shard in shards:
            shard.check(folder)
        splits[split] = _SplitState(**state | {"shards": shards})
    return _Job(folder, source, splits)


def _write_split(
    job: _Job, corpus: Corpus, tokenizer: Tokenizer, split: Split, bar: "_Bar"
) -> None:
    """Writes the shards of a split that are not there yet."""
    state = job.splits[split]
    if state.done:
        return
    dtype = token_dtype(tokenizer.vocab_size)
    documents = state.documents
    tokens = sum(shard.tokens for shard in state.shards)
    bar.start(split, documents, tokens)
    writer = _ShardWriter(job.folder, f"{split}_{len(state.shards):05d}.bin", dtype)
    try:
        for batch in _tokenised(corpus.resume(split, documents, state.place), tokenizer):
            for ids, place in batch:
                writer.append(ids, tokenizer.end_of_text)
                documents += 1
                if writer.tokens >= job.source.shard_tokens:
                    tokens += writer.tokens
                    state.shards.append(writer.finish())
                    state.documents, state.place = documents, place
                    job.save()
                    writer = _ShardWriter(job.folder, f"{split}_{len(state.shards):05d}.bin", dtype)
            bar.show(documents, tokens + writer.tokens)
        if writer.tokens:
            state.shards.append(writer.finish())
        state.documents, state.done, state.place = documents, True, None
        job.save()
    finally:
        writer.close()


def _tokenised(
    documents: Iterable[tuple[str, Any]], tokenizer: Tokenizer
) -> Iterator[list[tuple[list[int], Any]]]:
    """Batches of documents as token ids, each with its place.

    Tokenising leaves Python's lock, so meanwhile the next batch is read and the last one written.
    """
    waiting: deque[tuple[Future[list[list[int]]], list[Any]]] = deque()
    with ThreadPoolExecutor(TOKENISING) as pool:

        def oldest() -> list[tuple[list[int], Any]]:
            ids, places = waiting.popleft()
            return list(zip(ids.result(), places, strict=True))

        for texts, places in batches(documents, BATCH_CHARACTERS):
            waiting.append((pool.submit(tokenizer.encode_batch, texts), places))
            if len(waiting) > TOKENISING:
                yield oldest()
        while waiting:
            yield oldest()


def batches(
    documents: Iterable[tuple[str, Any]], at_once: int
) -> Iterator[tuple[list[str], list[Any]]]:
    """Texts and places in lists, never empty ones.

    Args:
        documents: of `Corpus.resume`.
        at_once: characters of each list, or a little more.
    """
    texts: list[str] = []
    places: list[Any] = []
    characters = 0
    for text, place in documents:
        texts.append(text)
        places.append(place)
        characters += len(text)
        if characters >= at_once:
            yield texts, places
            texts, places, characters = [], [], 0
    if texts:
        yield texts, places


def _finish(job: _Job, tokenizer: Tokenizer) -> None:
    """Makes a store of the finished shards."""
    tokenizer.save(job.folder / TOKENIZER)
    record = StoreRecord(
        source=job.source,
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text,
        end_of_text_token=tokenizer.end_of_text_token,
        splits={split: job.splits[split].shards for split in SPLITS},
    )
    record.save(job.folder)
    (job.folder / PROGRESS).unlink()
    for path in job.folder.glob(f"*{TEMPORARY}"):  # of a process that was killed
        path.unlink()


def _discard(folder: Path, folder_too: bool) -> None:
    """Takes back everything that this call wrote."""
    for path in [*folder.glob("*.bin"), *folder.glob(f"*{TEMPORARY}"), folder / PROGRESS]:
        path.unlink(missing_ok=True)
    if folder_too:
        folder.rmdir()


class _ShardWriter:
    """Appends token ids to a file that gets its name only when it is complete."""

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self._path = folder / name
        self._temporary = folder / f"{name}{TEMPORARY}"
        self._file = self._temporary.open("wb")
        self._hash = sha256()
        self._dtype = np.dtype(dtype)
        self.tokens = 0

    def append(self, ids: list[int], end_of_text: int) -> None:
        content = np.array([*ids, end_of_text], dtype=self._dtype).tobytes()
        self._file.write(content)
        self._hash.update(content)
        self.tokens += len(ids) + 1

    def finish(self) -> Shard:
        """Flushes the file to the disk and gives it its name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        rename_durably(self._temporary, self._path)
        num_bytes = self.tokens * self._dtype.itemsize
        return Shard(self._path.name, self.tokens, num_bytes, self._hash.hexdigest())

    def close(self) -> None:
        """Drops the file unless it was finished."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


class _Bar:
    """One line per split on stderr: documents, tokens, tokens/s."""

    def __init__(self, shown: Progress) -> None:
        self._shown = shown

    def start(self, split: str, documents: int, tokens: int) -> None:
        self._split, self._first = split, tokens
        self._task = self._shown.add_task(self._line(documents, tokens, ""), total=None)

    def show(self, documents: int, tokens: int) -> None:
        seconds = self._shown.tasks[-1].elapsed or 0.0
        speed = f", {(tokens - self._first) / seconds:,.0f} tokens/s" if seconds else ""
        self._shown.update(self._task, description=self._line(documents, tokens, speed))

    def _line(self, documents: int, tokens: int, speed: str) -> str:
        return f"tokenising {self._split}: {documents:,} documents, {tokens:,} tokens{speed}"


@contextmanager
def _bar(visible: bool) -> Iterator[_Bar]:
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not visible) as shown:
        yield _Bar(shown)
