"""The published order of samples: which tokens make up sample i, from sizes, epochs and a seed.

GPT-NeoX lays the documents of all epochs out in one shuffled row, cuts the row into samples of T
tokens (neighbours share one more), and shuffles the samples:

    doc_idx      [documents x epochs]  document at each place of the row
    sample_idx   [samples + 1, 2]      (place in the row, token in that document) where each begins
    shuffle_idx  [samples]             the sample that comes i-th

One `RandomState(seed)` shuffles both, the documents of all epochs together: the order depends on
the number of epochs, and epochs mix. The arrays are those of the published code, number for
number; they are computed in chunks of a few hundred MB and memory-mapped from a cache.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from tokengrow.files import atomic_directory, directory_lock

_CHUNK = 2**22


@dataclass(frozen=True)
class OrderKey:
    """What an order depends on."""

    content: str
    """Fingerprint of the files that hold the documents."""
    first: int
    """Number of the first document."""
    stop: int
    """Number behind the last document."""
    epochs: int
    """How often the row holds each document."""
    context_length: int
    """T."""
    seed: int
    """Of the two shuffles."""


@dataclass(frozen=True)
class SampleOrder:
    """The three arrays, memory-mapped."""

    folder: Path
    """Where they lie."""
    doc_idx: np.ndarray
    """int32 [documents x epochs]."""
    sample_idx: np.ndarray
    """int32 (int64 where places need it) [samples + 1, 2]."""
    shuffle_idx: np.ndarray
    """uint32 (int64 where samples need it) [samples]."""

    @classmethod
    def open(cls, folder: Path) -> "SampleOrder":
        """What `build_order` wrote."""
        names = ("doc_idx", "sample_idx", "shuffle_idx")
        return cls(folder, *(np.load(folder / f"{name}.npy", mmap_mode="r") for name in names))

    def __reduce__(self) -> Any:
        # A memory map is pickled as the whole of its content; a loader's worker opens it anew.
        return SampleOrder.open, (self.folder,)


def split_documents(split: str, documents: int) -> list[int]:
    """The boundaries of train, validation and test: [0, a, b, documents].

    Args:
        split: three weights, as in `969, 30, 1`; missing ones are 0.
        documents: how many there are.

    Raises:
        ValueError: no numbers, or none above 0.
    """
    weights = [float(part) for part in split.split("/" if "/" in split else ",")][:3]
    weights += [0.0] * (3 - len(weights))
    total = sum(weights)
    if min(weights) < 0 or not 0 < total < float("inf"):
        raise ValueError("give weights of at least 0, one of them above it")
    bounds = [0]
    for weight in weights:
        bounds.append(bounds[-1] + round(weight / total * documents))
    excess = bounds[-1] - documents  # of the rounding; taken from every boundary, as published
    return [0, *(bound - excess for bound in bounds[1:])]


def num_samples(tokens: int, epochs: int, context_length: int) -> int:
    """Samples in so many epochs of a split: the last token is nobody's first."""
    return max(0, epochs * tokens - 1) // context_length


def num_epochs(tokens: int, context_length: int, samples: int) -> int:
    """The fewest epochs of a split of so many tokens that hold `samples` samples, at least 1."""
    return max(1, -(-(samples * context_length + 1) // tokens))


def build_order(sizes: np.ndarray, key: OrderKey, folder: Path) -> None:
    """Computes the arrays into `folder`, one .npy file each.

    At its peak this holds one of the two shuffled arrays (4 bytes per document and epoch, or per
    sample) and a chunk.

    Args:
        sizes: int32 [S] tokens of each document, best memory-mapped.
        key: what is wanted; `content` is not used.
        folder: exists.
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
    """Where samples 0 to `samples` begin, in order, as int64 [n, 2] pieces."""
    yield np.zeros((1, 2), dtype=np.int64)  # also where the first document is empty
    done, before = 1, 0  # starts found, tokens in front of the chunk
    for at in range(0, len(doc_idx), _CHUNK):
        lengths = sizes[doc_idx[at : at + _CHUNK]].astype(np.int64)
        ends = before + np.cumsum(lengths)
        stop = min(samples, (int(ends[-1]) - 1) // context_length) + 1
        starts = np.arange(done, stop, dtype=np.int64) * context_length
        places = np.searchsorted(ends, starts, side="right")  # past documents that end there
        yield np.stack([at + places, starts - (ends - lengths)[places]], axis=1)
        done, before = max(done, stop), int(ends[-1])


def prepare_order(sizes: np.ndarray, key: OrderKey, cache: Path) -> SampleOrder:
    """The order in the cache folder, computed where it is not there yet.

    Args:
        sizes: as for `build_order`.
        key: what is wanted, content included: it names the cache entry.
        cache: the folder of all caches.
    """
    name = sha256(json.dumps(asdict(key), sort_keys=True).encode()).hexdigest()[:16]
    folder = cache / "megatron" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with directory_lock(folder.parent):  # of several processes the first computes, the others wait
        if not folder.is_dir():
            with atomic_directory(folder) as partial:
                build_order(sizes, key, partial)
    return SampleOrder.open(folder)
