"""Speed of tokenising next to the bare tokenizer, and of loading next to plain reads.

Shapes: `B` micro-batch, `T` sequence.
"""

import os
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import tokenizers
import torch

from tokengrow.bench.rows import Measurement
from tokengrow.bench.timing import Timing
from tokengrow.data.corpus import Corpus
from tokengrow.data.loader import train_loader
from tokengrow.data.sequences import TokenArray
from tokengrow.data.store import TokenStore, build_store
from tokengrow.data.store_record import SPLITS
from tokengrow.data.store_writer import batch_documents
from tokengrow.data.tokenizer import Tokenizer
from tokengrow.errors import UserError

ROUNDS = 3
"""Rounds over the full text, after a warm-up round."""
AT_ONCE = 2**24
"""Characters per call of the bare tokenizer, enough to keep its cores busy."""
CONTEXT, MICRO_BATCH, BATCH = 2048, 16, 512
"""T, B and the sequences of a global batch."""
RUNS, MICRO_BATCHES = 6, 100
"""Timed runs of a loader, and the micro-batches of each."""
PIECE = 2**20
"""Tokens that are read at once in sequence."""


def measure(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> Iterator[Measurement]:
    """Tokenising a corpus, then loading the store that it gives.

    Args:
        corpus: its text passes through memory a few times.
        tokenizer: that makes the tokens.
        folder: on the disk that is to be measured; what is written there is removed again.

    Raises:
        UserError: a store that does not hold the tokens of the text; no time of it is given.
    """
    with TemporaryDirectory(dir=folder) as made:
        yield from _tokenising(corpus, tokenizer, Path(made))
        yield from _loading(build_store(corpus, tokenizer, Path(made) / "0", progress=False))


def _tokenising(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> Iterator[Measurement]:
    """Yield rows for tokenising into a store, in turn with the bare tokenizer."""
    bare = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    bare.encode_special_tokens = True  # as `Tokenizer` has it
    limit = f"tokenizers {version('tokenizers')}"
    times: dict[str, list[float]] = {limit: [], "text to token store": []}
    for turn in range(1 + ROUNDS):
        seconds, tokens, documents, size = _encode(bare, corpus)
        began = time.perf_counter()
        store = build_store(corpus, tokenizer, folder / str(turn), progress=False)
        whole = time.perf_counter() - began
        found = sum(len(store.split(split)) for split in SPLITS)
        if found != tokens + documents:
            raise UserError(
                f"the store of {documents:,} documents has {found:,} tokens, not "
                f"{tokens + documents:,}: no time is given for it"
            )
        if turn:
            for name, each in zip(times, (seconds, whole), strict=True):
                times[name].append(each * 1e3)
    case = f"{size / 1e6:.1f} MB of text, {documents:,} documents, {os.cpu_count()} cores"
    yield from _rows("tokenise", case, times, size / 1e6, "MB/s", store)


def _encode(bare: tokenizers.Tokenizer, corpus: Corpus) -> tuple[float, int, int, int]:
    """Seconds of the tokenizer over both splits, reading not counted; tokens, documents, bytes."""
    seconds, tokens, documents, size = 0.0, 0, 0, 0
    for split in SPLITS:
        for batch, _ in batch_documents(corpus.resume(split, 0, None), AT_ONCE):
            began = time.perf_counter()
            encodings = bare.encode_batch_fast(batch, add_special_tokens=False)
            seconds += time.perf_counter() - began
            tokens += sum(map(len, encodings))
            documents += len(batch)
            size += sum(len(text.encode()) for text in batch)
    return seconds, tokens, documents, size


def _loading(store: TokenStore) -> Iterator[Measurement]:
    """Yield rows for loading micro-batches, next to sequential reads of as many tokens."""
    sequences, tokens = store.sequences("train", CONTEXT), store.split("train")

    def loader(workers: int) -> Callable[[], object]:
        batches = iter(
            train_loader(
                sequences, seed=0, batch_size=BATCH, micro_batch_size=MICRO_BATCH, workers=workers
            )
        )
        return lambda: sum(len(batch) for batch in islice(batches, MICRO_BATCHES))

    per_run = MICRO_BATCHES * MICRO_BATCH * CONTEXT
    ways = {
        "read in sequence": lambda: _read(tokens, per_run),
        "loader": loader(workers=0),
        "loader, 1 worker": loader(workers=1),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(1 + RUNS):
        for name, load in ways.items():
            began = time.perf_counter()
            load()
            if turn:
                times[name].append((time.perf_counter() - began) * 1e3 / MICRO_BATCHES)
    case = f"T {CONTEXT}, micro-batch {MICRO_BATCH}, {len(tokens):,} tokens"
    yield from _rows("load", case, times, MICRO_BATCH * CONTEXT / 1e6, "M tokens/s", store)


def _read(tokens: TokenArray, count: int) -> None:
    """Read a number of tokens from the start, repeatedly if there are fewer."""
    while count > 0:
        for start in range(0, min(len(tokens), count), PIECE):
            tokens.read(start, min(PIECE, len(tokens) - start))
        count -= len(tokens)


def _rows(
    what: str, case: str, times: dict[str, list[float]], amount: float, unit: str, store: TokenStore
) -> Iterator[Measurement]:
    """Yield a row per function; the first is the limit.

    Args:
        what: tokenise or load.
        case: sizes.
        times: milliseconds of each, several.
        amount: of what passes in such a time, in the unit times seconds.
        unit: of the rates.
        store: that was made or read.
    """
    timings = {name: Timing.of(each) for name, each in times.items()}
    limit = next(iter(timings.values())).median
    for name, timing in timings.items():
        yield Measurement.on(
            torch.device("cpu"),
            timing,
            suite="data",
            case=f"{what}: {case}",
            peer=name,
            dtype=np.dtype(store.record.dtype).name,
            against_limit=round(limit / timing.median, 3),
            peak_gb=0.0,
            error=0.0,
            rate=float(f"{amount / timing.median * 1e3:.4g}"),
            unit=unit,
        )
