"""Published order of samples: the tokens of sample i, as a function of sizes, epochs and a seed.

GPT-NeoX concatenates the documents of all epochs in one shuffled row, cuts the row into samples of
T tokens (consecutive samples share one more), and shuffles the samples:

    doc_idx      [documents x epochs]  document at each position of the row
    sample_idx   [samples + 1, 2]      (position in the row, token in that document) of each start
    shuffle_idx  [samples]             the sample that comes i-th

One `RandomState(seed)` makes both shuffles, over the documents of all epochs together. The order
therefore depends on the number of epochs, and epochs are mixed. The arrays are equal to those of
the published code. They are computed in chunks of a few hundred MB and memory-mapped from a cache.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from tokengrow.files import atomic_directory, directory_lock

_CHUNK_SIZE = 2**22


@dataclass(frozen=True)
class OrderKey:
    """Inputs that determine an order."""

    content: str
    """Fingerprint of the files that hold the documents."""
    first: int
    """Number of the first document."""
    stop: int
    """Number of the last document plus one."""
    epochs: int
    """Number of times that the row holds each document."""
    context_length: int
    """Context length T."""
    seed: int
    """Seed of the two shuffles."""


@dataclass(frozen=True)
class SampleOrder:
    """The three arrays of an order, memory-mapped."""

    folder: Path
    """Folder of the arrays."""
    doc_idx: np.ndarray
    """Documents of the row, int32 [documents x epochs]."""
    sample_idx: np.ndarray
    """Starts of the samples, int32 (int64 if positions require it) [samples + 1, 2]."""
    shuffle_idx: np.ndarray
    """Order of the samples, uint32 (int64 if samples require it) [samples]."""

    @classmethod
    def open(cls, folder: Path) -> "SampleOrder":
        """Open the arrays that `build_order` wrote."""
        names = ("doc_idx", "sample_idx", "shuffle_idx")
        return cls(folder, *(np.load(folder / f"{name}.npy", mmap_mode="r") for name in names))

    def __reduce__(self) -> Any:
        # Pickling a memory map copies its content. Loader workers reopen the files instead.
        return SampleOrder.open, (self.folder,)


def split_documents(split: str, documents: int) -> list[int]:
    """Return the boundaries of train, validation and test: [0, a, b, documents].

    Args:
        split: three weights, for example `969, 30, 1`; missing ones are 0.
        documents: number of documents.

    Raises:
        ValueError: a weight is not a number or is negative, or all weights are 0.
    """
    weights = [float(part) for part in split.split("/" if "/" in split else ",")][:3]
    weights += [0.0] * (3 - len(weights))
    total = sum(weights)
    if min(weights) < 0 or not 0 < total < float("inf"):
        raise ValueError("weights must be at least 0, and one of them greater than 0")
    bounds = [0]
    for weight in weights:
        bounds.append(bounds[-1] + round(weight / total * documents))
    excess = bounds[-1] - documents  # from rounding; subtracted from every bound, as published
    return [0, *(bound - excess for bound in bounds[1:])]


def num_samples(tokens: int, epochs: int, context_length: int) -> int:
    """Return the number of samples in epochs of `tokens` tokens; the last token starts none."""
    return max(0, epochs * tokens - 1) // context_length


def num_epochs(tokens: int, context_length: int, samples: int) -> int:
    """Return the least number of epochs of `tokens` tokens that holds `samples` samples, min. 1."""
    return max(1, -(-(samples * context_length + 1) // tokens))


def build_order(sizes: np.ndarray, key: OrderKey, folder: Path) -> None:
    """Compute the arrays and write them to `folder`, one .npy file each.

    The peak memory is one of the two shuffled arrays (4 bytes per document and epoch, or per
    sample) plus one chunk.

    Args:
        sizes: tokens of each document, int32 [S], preferably memory-mapped.
        key: the order; `content` is not used.
        folder: existing folder.
    """
    random = np.random.RandomState(key.seed)
    doc_idx = np.tile(np.arange(key.first, key.stop, dtype=np.int32), key.epochs)
    random.shuffle(doc_idx)
    np.save(folder / "doc_idx.npy", doc_idx)
    tokens = int(sizes[key.first : key.stop].sum(dtype=np.int64))
    samples = num_samples(tokens, key.epochs, key.context_length)
    with (folder / "sample_idx.npy").open("wb") as file:
        dtype = np.dtype("<i4" if len(doc_idx) < 2**31 else "<i8")
        np.lib.format.write_array_header_1_0(
            file, {"descr": dtype.str, "fortran_order": False, "shape": (samples + 1, 2)}
        )
        for starts in _sample_starts(sizes, doc_idx, key.context_length, samples):
            file.write(starts.astype(dtype).tobytes())
    del doc_idx
    shuffle_idx = np.arange(samples, dtype=np.uint32 if samples < 2**32 - 1 else np.int64)
    random.shuffle(shuffle_idx)
    np.save(folder / "shuffle_idx.npy", shuffle_idx)


def _sample_starts(
    sizes: np.ndarray, doc_idx: np.ndarray, context_length: int, samples: int
) -> Iterator[np.ndarray]:
    """Yield the starts of samples 0 to `samples` in order, in chunks of int64 [n, 2]."""
    yield np.zeros((1, 2), dtype=np.int64)  # also if the first document is empty
    done, tokens_before = 1, 0  # starts yielded, tokens before the chunk
    for chunk in range(0, len(doc_idx), _CHUNK_SIZE):
        lengths = sizes[doc_idx[chunk : chunk + _CHUNK_SIZE]].astype(np.int64)
        ends = tokens_before + np.cumsum(lengths)
        stop = min(samples, (int(ends[-1]) - 1) // context_length) + 1
        starts = np.arange(done, stop, dtype=np.int64) * context_length
        positions = np.searchsorted(ends, starts, side="right")  # after documents that end there
        yield np.stack([chunk + positions, starts - (ends - lengths)[positions]], axis=1)
        done, tokens_before = max(done, stop), int(ends[-1])


def prepare_order(sizes: np.ndarray, key: OrderKey, cache: Path) -> SampleOrder:
    """Open the order in the cache folder; compute it if it is missing.

    Args:
        sizes: tokens of each document; see `build_order`.
        key: the order; a hash of the key, including `content`, is the name of the cache entry.
        cache: folder of all caches.
    """
    name = sha256(json.dumps(asdict(key), sort_keys=True).encode()).hexdigest()[:16]
    folder = cache / "megatron" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with directory_lock(folder.parent):  # the first process computes, the others wait
        if not folder.is_dir():
            with atomic_directory(folder) as partial:
                build_order(sizes, key, partial)
    return SampleOrder.open(folder)
