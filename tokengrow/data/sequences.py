"""Token streams on disk, cut into sequences for training."""

import os
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from tokengrow.data.corpus import Split
from tokengrow.data.order import batch_indices
from tokengrow.data.tokenizer import Tokenizer
from tokengrow.errors import UserError


class TokenArray:
    """Token ids of one split, read from disk on demand.

    This process keeps only the tokens of the current call. A memory map would read far more than
    requested from a disk, and a truncated file or a failing disk would end the process with a bus
    error (docs/results/data.md).
    """

    def __init__(
        self,
        files: list[Path],
        lengths: list[int],
        dtype: str,
        vocab_size: int | None = None,
        first: int = 0,
    ) -> None:
        """Describe the shards; no file is opened.

        Args:
            files: the shards in order.
            lengths: tokens in each shard.
            dtype: NumPy name of the type of an id.
            vocab_size: ids from this value are rejected when they are read; None: accept all.
            first: tokens of the first shard before the split.
        """
        self._files, self._dtype, self._first = files, np.dtype(dtype), first
        self._vocab_size = vocab_size
        self._ends = list(accumulate(lengths))
        self._cache_key = object()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, length: int) -> np.ndarray:
        """Read tokens `start` to `start + length` as int64 [length], across shards if necessary.

        Raises:
            IndexError: the range exceeds the split.
            UserError: a file cannot be read or is too short, or an id exceeds the vocabulary. The
                message names the file and the byte.
        """
        if start < 0 or length < 0 or start + length > len(self):
            raise IndexError(f"tokens {start} to {start + length} of a split of {len(self)}")
        tokens = np.empty(length, dtype=np.int64)
        done = 0
        while done < length:
            shard = bisect_right(self._ends, start + done)
            offset = start + done - (self._ends[shard - 1] if shard else 0)
            count = min(length - done, self._ends[shard] - start - done)
            tokens[done : done + count] = self._read_shard(shard, offset, count)
            done += count
        return tokens

    def _read_shard(self, shard: int, offset: int, count: int) -> np.ndarray:
        """Read ids of one shard, [count] of the type on disk."""
        byte = (offset + (0 if shard else self._first)) * self._dtype.itemsize
        ids = np.empty(count, dtype=self._dtype)
        try:
            file = _open_cached(self._cache_key, str(self._files[shard]))
            num_bytes = file.read_into(ids.view("u1"), byte)
        except OSError as error:
            raise self._unreadable(shard, f"cannot be read ({error.strerror})") from None
        if num_bytes < ids.nbytes:
            raise self._unreadable(shard, f"ends at byte {byte + num_bytes}")
        if self._vocab_size is not None and ids.size:
            unsigned = ids.view(f"<u{self._dtype.itemsize}")  # negative ids become large
            if unsigned.max() >= self._vocab_size:
                wrong = int(np.argmax(unsigned >= self._vocab_size))
                raise UserError(
                    f"{self._files[shard]} byte {byte + wrong * self._dtype.itemsize}: token id "
                    f"{ids[wrong]} is outside the tokenizer's vocabulary of {self._vocab_size}. "
                    "Restore the file, or give the tokenizer that made it."
                )
        return ids

    def _unreadable(self, shard: int, reason: str) -> UserError:
        return UserError(
            f"Token file {self._files[shard]} {reason}, but the run needs it. Restore it, or make "
            "it again with `tokengrow data`."
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache_key": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _cache_key=object())  # open files belong to one process


class _OpenFile:
    """File that is open for reading until the last reference to it is dropped."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def read_into(self, target: np.ndarray, byte: int) -> int:
        """Fill uint8 [n] from a byte offset; return the bytes read, fewer only at the end."""
        done = 0
        while done < len(target):
            # preadv moves no file position, so loader workers may share the descriptor.
            count = os.preadv(self._descriptor, [target[done:].data], byte + done)
            if not count:
                break
            done += count
        return done

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


@lru_cache(maxsize=256)
def _open_cached(key: object, path: str) -> _OpenFile:
    """Return the open file of the `TokenArray` that `key` identifies.

    The cache bounds the number of open files: a store of 300 billion tokens has 4,500 shards, but
    the default limit of a process is 1,024 descriptors.
    """
    return _OpenFile(path)


class Sequences(Dataset[torch.Tensor]):
    """Split cut into sequences: item `i` is tokens `i * T` to `i * T + T`, int64 [T + 1].

    Consecutive sequences share one token, so that every token except the very first is a target
    exactly once.
    """

    def __init__(self, tokens: TokenArray, context_length: int) -> None:
        self.tokens, self.context_length = tokens, context_length

    def __len__(self) -> int:
        return max(0, len(self.tokens) - 1) // self.context_length

    def __getitem__(self, index: int) -> torch.Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        start = index * self.context_length
        return torch.from_numpy(self.tokens.read(start, self.context_length + 1))

    def batch_indices(self, number: int, size: int, seed: int) -> np.ndarray:
        """Return the sequences of global batch `number`, int64 [size]."""
        return batch_indices(seed, number, size, len(self))

    def evenly_spaced(self, count: int) -> np.ndarray:
        """Return `count` sequences at even distances over the full split, int64 [count]."""
        return np.arange(count, dtype=np.int64) * len(self) // max(count, 1)


class TokenSource(Protocol):
    """Tokens of a run: a token store, a mixture of stores, or Megatron files."""

    @property
    def vocab_size(self) -> int:
        """Largest token id that can occur, plus one."""

    @property
    def fingerprint(self) -> str:
        """Identifier of the tokens in hex: runs with the same one and seed get the same batches."""

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that made the tokens."""

    def sequences(self, name: Split, context_length: int) -> Sequences:
        """Return a split cut into sequences.

        Raises:
            UserError: the split is shorter than one sequence.
        """


def check_split_length(
    tokens: int, context_length: int, split: Split, remedy: str = "raise data.validation_fraction"
) -> None:
    """Raise `UserError` if a split is shorter than one sequence.

    Args:
        tokens: number of tokens in the split.
        context_length: T; a sequence has T + 1 tokens.
        split: name of the split.
        remedy: way to get a longer validation split from the same text, as an imperative clause.
    """
    if tokens <= context_length:
        remedies = ["give more text or a smaller model.context_length"]
        if split == "validation":
            remedies.insert(0, remedy)
        advice = ", or ".join(remedies)
        raise UserError(
            f"data must have at least one sequence of model.context_length + 1 = "
            f"{context_length + 1} tokens in its {split} split, got {tokens} tokens. "
            f"{advice[0].upper()}{advice[1:]}."
        )
