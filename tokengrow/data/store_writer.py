"""Writer of token stores, shard by shard: a killed process loses at most one shard."""

import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tokengrow.data.corpus import Corpus, Position, SourceInterruptedError, Split
from tokengrow.data.store_record import (
    MARKER,
    PROGRESS,
    SPLITS,
    TOKENIZER,
    Shard,
    StoreRecord,
    StoreSource,
    token_dtype,
)
from tokengrow.data.tokenizer import Tokenizer
from tokengrow.errors import UserError
from tokengrow.files import TEMPORARY, directory_lock, rename_durably, write_atomically

CHARACTERS_PER_BATCH = 2**22
"""Characters passed to the tokenizer in one call: enough documents to keep many cores busy."""
MAX_CONCURRENT_BATCHES = 2
"""Batches that are tokenised concurrently: the second keeps the cores busy as the first ends."""


@dataclass
class _SplitState:
    """Progress of one split: the content of its finished shards."""

    documents: int = 0
    done: bool = False
    shards: list[Shard] = field(default_factory=list)
    position: Position = None
    """Position of the corpus after the documents of these shards; see `Corpus.resume`."""


@dataclass
class _UnfinishedStore:
    """Store that is being built; on disk, `progress.json` and the shards that it lists."""

    folder: Path
    source: StoreSource
    splits: dict[Split, _SplitState]

    def save(self) -> None:
        """Write `progress.json`, atomically."""
        splits = {
            split: {
                "documents": state.documents,
                "done": state.done,
                "shards": [asdict(shard) for shard in state.shards],
                "place": state.position,
            }
            for split, state in self.splits.items()
        }
        values = {"source": asdict(self.source), "splits": splits}
        write_atomically(self.folder / PROGRESS, json.dumps(values).encode())


def write_store(
    corpus: Corpus, tokenizer: Tokenizer, folder: Path, *, shard_tokens: int, progress: bool
) -> None:
    """Write a complete store into a folder; see `tokengrow.data.store.build_store`."""
    if shard_tokens < 1:
        raise UserError(f"data.shard_tokens must be at least 1, got {shard_tokens}.")
    # Computed before anything is written, because it raises for missing files. Decoding the JSON
    # turns tuples into lists, so that equal identities compare as equal.
    identity = json.loads(json.dumps(corpus.identity()))
    source = StoreSource(
        identity=identity, tokenizer=tokenizer.fingerprint, shard_tokens=shard_tokens
    )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out must be a folder, got {folder}, a file. Choose another out=.")
    is_new_folder = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with directory_lock(folder):
        if not folder.exists():  # the previous holder of the lock has removed what it wrote
            folder.mkdir(parents=True)
            is_new_folder = True
        if (folder / MARKER).is_file():
            _check_source(folder, "made", StoreRecord.load(folder).source, source)
            (folder / PROGRESS).unlink(missing_ok=True)  # killed after writing the marker
            return
        resumed = (folder / PROGRESS).is_file()
        store = _load_unfinished(folder, source) if resumed else _create(folder, source)
        try:
            with _progress_line(progress) as line:
                for split in SPLITS:
                    _write_split(store, corpus, tokenizer, split, line)
            if not store.splits["train"].documents:
                raise UserError(
                    "data must have text in its train split, got no text. Check the files and "
                    "data.validation_fraction."
                )
        except UserError as error:
            # Wrong input leaves no files. Shards of an earlier call are kept, and so are those
            # before an interruption of the source: they are valid, and the cause may be temporary.
            if not resumed and not isinstance(error, SourceInterruptedError):
                _discard(folder, is_new_folder)
            raise
        _finish(store, tokenizer)


def _check_source(folder: Path, verb: str, recorded: StoreSource, source: StoreSource) -> None:
    """Raise `UserError` if the store in a folder is of another corpus or tokenizer."""
    for name, is_same in (
        ("corpus", recorded.identity == source.identity),
        ("tokenizer", recorded.tokenizer == source.tokenizer),
    ):
        if not is_same:
            raise UserError(
                f"out: the token store in {folder} was {verb} from another {name}. Choose another "
                "out=, or delete that folder."
            )


def _create(folder: Path, source: StoreSource) -> _UnfinishedStore:
    """Create an empty store in an empty folder."""
    if any(not path.name.endswith(TEMPORARY) for path in folder.iterdir()):
        raise UserError(
            f"out must be a new or empty folder, or a token store, got {folder}, which holds other "
            "files. Choose another out=."
        )
    store = _UnfinishedStore(folder, source, {split: _SplitState() for split in SPLITS})
    store.save()
    return store


def _load_unfinished(folder: Path, source: StoreSource) -> _UnfinishedStore:
    """Load the store recorded in `progress.json`, and check the size of its shards."""
    values = json.loads((folder / PROGRESS).read_bytes())
    recorded = StoreSource(**values["source"])
    _check_source(folder, "started", recorded, source)
    if recorded.shard_tokens != source.shard_tokens:
        raise UserError(
            f"out: the token store in {folder} was started with shard_tokens="
            f"{recorded.shard_tokens}, got {source.shard_tokens}. Give the same value, choose "
            "another out=, or delete that folder."
        )
    splits: dict[Split, _SplitState] = {}
    for split, state in values["splits"].items():
        shards = [Shard(**shard) for shard in state["shards"]]
        for shard in shards:
            shard.check(folder)
        position = state.get("place")
        splits[split] = _SplitState(state["documents"], state["done"], shards, position)
    return _UnfinishedStore(folder, source, splits)


def _write_split(
    store: _UnfinishedStore,
    corpus: Corpus,
    tokenizer: Tokenizer,
    split: Split,
    line: "_ProgressLine",
) -> None:
    """Write the missing shards of a split."""
    state = store.splits[split]
    if state.done:
        return

    def next_shard() -> _ShardWriter:
        name = f"{split}_{len(state.shards):05d}.bin"
        return _ShardWriter(store.folder, name, token_dtype(tokenizer.vocab_size))

    documents = state.documents
    tokens = sum(shard.tokens for shard in state.shards)
    line.start(split, documents, tokens)
    writer = next_shard()
    try:
        for batch in _tokenise(corpus.resume(split, documents, state.position), tokenizer):
            for ids, position in batch:
                writer.append(ids, tokenizer.end_of_text)
                documents += 1
                if writer.tokens >= store.source.shard_tokens:
                    tokens += writer.tokens
                    state.shards.append(writer.finish())
                    state.documents, state.position = documents, position
                    store.save()
                    writer = next_shard()
            line.update(documents, tokens + writer.tokens)
        if writer.tokens:
            state.shards.append(writer.finish())
        state.documents, state.done, state.position = documents, True, None
        store.save()
    finally:
        writer.close()


def _tokenise(
    documents: Iterable[tuple[str, Position]], tokenizer: Tokenizer
) -> Iterator[list[tuple[list[int], Position]]]:
    """Yield batches of documents as token ids, each document with its position.

    Tokenising releases Python's global lock. At the same time this thread reads the next batch, and
    the caller writes the previous one.
    """
    pending: deque[tuple[Future[list[list[int]]], list[Position]]] = deque()
    with ThreadPoolExecutor(MAX_CONCURRENT_BATCHES) as pool:

        def oldest() -> list[tuple[list[int], Position]]:
            ids, positions = pending.popleft()
            return list(zip(ids.result(), positions, strict=True))

        for texts, positions in batch_documents(documents, CHARACTERS_PER_BATCH):
            pending.append((pool.submit(tokenizer.encode_batch, texts), positions))
            if len(pending) > MAX_CONCURRENT_BATCHES:
                yield oldest()
        while pending:
            yield oldest()


def batch_documents(
    documents: Iterable[tuple[str, Position]], characters: int
) -> Iterator[tuple[list[str], list[Position]]]:
    """Yield non-empty batches of documents: their texts and their positions.

    Args:
        documents: texts and positions, from `Corpus.resume`.
        characters: a batch is closed at the first document that reaches this many characters.
    """
    texts: list[str] = []
    positions: list[Position] = []
    count = 0
    for text, position in documents:
        texts.append(text)
        positions.append(position)
        count += len(text)
        if count >= characters:
            yield texts, positions
            texts, positions, count = [], [], 0
    if texts:
        yield texts, positions


def _finish(store: _UnfinishedStore, tokenizer: Tokenizer) -> None:
    """Write the tokenizer and the record; remove temporary files."""
    tokenizer.save(store.folder / TOKENIZER)
    record = StoreRecord(
        source=store.source,
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text,
        end_of_text_token=tokenizer.end_of_text_token,
        splits={split: store.splits[split].shards for split in SPLITS},
    )
    record.save(store.folder)
    (store.folder / PROGRESS).unlink()
    for path in store.folder.glob(f"*{TEMPORARY}"):  # left by a process that was killed
        path.unlink()


def _discard(folder: Path, remove_folder: bool) -> None:
    """Remove all files that this call wrote."""
    for path in [*folder.glob("*.bin"), *folder.glob(f"*{TEMPORARY}"), folder / PROGRESS]:
        path.unlink(missing_ok=True)
    if remove_folder:
        folder.rmdir()


class _ShardWriter:
    """Writer of token ids to a file that gets its final name when it is complete."""

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self._path = folder / name
        self._temporary = folder / f"{name}{TEMPORARY}"
        self._file = self._temporary.open("wb")
        self._hash = sha256()
        self._dtype = np.dtype(dtype)
        self.tokens = 0

    def append(self, ids: list[int], end_of_text: int) -> None:
        """Write one document and the end-of-text id."""
        content = np.array([*ids, end_of_text], dtype=self._dtype).tobytes()
        self._file.write(content)
        self._hash.update(content)
        self.tokens += len(ids) + 1

    def finish(self) -> Shard:
        """Flush the file to the disk and rename it to its final name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        rename_durably(self._temporary, self._path)
        num_bytes = self.tokens * self._dtype.itemsize
        return Shard(self._path.name, self.tokens, num_bytes, self._hash.hexdigest())

    def close(self) -> None:
        """Remove the file unless it was finished."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


class _ProgressLine:
    """One line per split on stderr: documents, tokens, tokens/s."""

    def __init__(self, display: Progress) -> None:
        self._display = display

    def start(self, split: Split, documents: int, tokens: int) -> None:
        """Show the line of a split that has `documents` and `tokens` already."""
        self._split, self._first = split, tokens
        self._task = self._display.add_task(self._format(documents, tokens, ""), total=None)

    def update(self, documents: int, tokens: int) -> None:
        """Show the current counts and the speed."""
        seconds = self._display.tasks[-1].elapsed or 0.0
        speed = f", {(tokens - self._first) / seconds:,.0f} tokens/s" if seconds else ""
        self._display.update(self._task, description=self._format(documents, tokens, speed))

    def _format(self, documents: int, tokens: int, speed: str) -> str:
        return f"tokenising {self._split}: {documents:,} documents, {tokens:,} tokens{speed}"


@contextmanager
def _progress_line(visible: bool) -> Iterator[_ProgressLine]:
    """Yield a progress line; it is hidden unless `visible`."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not visible) as display:
        yield _ProgressLine(display)
