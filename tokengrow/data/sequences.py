"""A split of tokens as training meets it: a stream on the disk, cut into sequences."""

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
    """The token ids of one split, read from disk as they are asked for.

    Nothing is kept in this process but the tokens of the call. A memory map would read far more
    than is asked for from a disk, and answer a file that has become shorter, or a disk that fails,
    with a bus error (docs/results/data.md).

    Args:
        files: the shards in order.
        lengths: tokens in each shard.
        dtype: NumPy's name of the type of an id.
        vocab_size: ids from here on are refused as they are read; None: none is.
        first: tokens of the first shard that lie before the split.
    """

    def __init__(
        self,
        files: list[Path],
        lengths: list[int],
        dtype: str,
        vocab_size: int | None = None,
        first: int = 0,
    ) -> None:
        self._files, self._dtype, self._first = files, np.dtype(dtype), first
        self._vocab_size = vocab_size
        self._ends = list(accumulate(lengths))
        self._key = object()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens ``start`` to ``start + length`` as int64 [length], across shards where need be.

        Raises:
            IndexError: a part of the range lies outside.
            UserError: a file that cannot be read or ends too soon, or an id outside the vocabulary;
                names the file and the byte.
        """
        if start < 0 or length < 0 or start + length > len(self):
            raise IndexError(f"tokens {start} to {start + length} of a split of {len(self)}")
        result = np.empty(length, dtype=np.int64)
        done = 0
        while done < length:
            shard = bisect_right(self._ends, start + done)
            offset = start + done - (self._ends[shard - 1] if shard else 0)
            count = min(length - done, self._ends[shard] - start - done)
            result[done : done + count] = self._piece(shard, offset, count)
            done += count
        return result

    def _piece(self, shard: int, offset: int, count: int) -> np.ndarray:
        """Ids of one shard, [count] of the type on disk."""
        byte = (offset + (0 if shard else self._first)) * self._dtype.itemsize
        piece = np.empty(count, dtype=self._dtype)
        try:
            found = _opened(self._key, str(self._files[shard])).read_at(piece.view("u1"), byte)
        except OSError as error:
            raise self._unreadable(shard, f"cannot be read ({error.strerror})") from None
        if found < piece.nbytes:
            raise self._unreadable(shard, f"ends at byte {byte + found}")
        if self._vocab_size is not None and piece.size:
            unsigned = piece.view(f"<u{self._dtype.itemsize}")  # in which a negative id is large
            if unsigned.max() >= self._vocab_size:
                wrong = int(np.argmax(unsigned >= self._vocab_size))
                raise UserError(
                    f"{self._files[shard]} byte {byte + wrong * self._dtype.itemsize}: token id "
                    f"{piece[wrong]} lies outside the tokenizer's vocabulary of "
                    f"{self._vocab_size}: put the file back as it was, or give the tokenizer that "
                    "made it"
                )
        return piece

    def _unreadable(self, shard: int, reason: str) -> UserError:
        return UserError(
            f"token file {self._files[shard]} {reason}, and the run needs it: put it back as it "
            "was, or make it anew with `tokengrow data`"
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_key": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _key=object())  # no open file is another process's


class _OpenFile:
    """A file open for reading until nobody needs it."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def read_at(self, target: np.ndarray, byte: int) -> int:
        """Fills uint8 [n] from a place on; gives the bytes found, fewer only at the file's end."""
        done = 0
        while done < len(target):
            # With no position of its own to move, loader workers may share the descriptor.
            found = os.preadv(self._descriptor, [target[done:].data], byte + done)
            if not found:
                break
            done += found
        return done

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


@lru_cache(maxsize=256)
def _opened(key: object, path: str) -> _OpenFile:
    """The open file of a `TokenArray`, named by its key; as many at a time as a process may have.

    A store of 300 billion tokens has 4,500 shards, and by default a process 1,024 descriptors.
    """
    return _OpenFile(path)


class Sequences(Dataset[torch.Tensor]):
    """A split cut into sequences: item ``i`` is tokens ``i * T`` to ``i * T + T``, int64 [T + 1].

    Neighbours share one token, so that every token but the very first is a target exactly once.
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

    def batch(self, number: int, size: int, seed: int) -> np.ndarray:
        """The sequences of global batch ``number``, int64 [size]: see `order.batch_indices`."""
        return batch_indices(seed, number, size, len(self))

    def spread(self, count: int) -> np.ndarray:
        """`count` sequences at even distances over the whole split, int64 [count]."""
        return np.arange(count, dtype=np.int64) * len(self) // max(count, 1)


class TokenSource(Protocol):
    """What a run takes its tokens from: a token store, or files that others have tokenised."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id that can occur."""

    @property
    def fingerprint(self) -> str:
        """Names the tokens in hex: two runs that share it, and a seed, see the same batches."""

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens."""

    def sequences(self, name: Split, context_length: int) -> Sequences:
        """A split cut into sequences.

        Raises:
            UserError: the split is shorter than one sequence.
        """


def check_length(
    tokens: int, context_length: int, split: Split, way_out: str = "raise data.validation_fraction"
) -> None:
    """Refuses a split that is shorter than one sequence.

    Args:
        tokens: in the split.
        context_length: T; a sequence takes one token more.
        split: its name.
        way_out: how to get a longer validation split out of the same text.
    """
    if tokens <= context_length:
        ways = ["give more text or a smaller model.context_length"]
        if split == "validation":
            ways.insert(0, way_out)
        raise UserError(
            f"data: the {split} split has {tokens} tokens, fewer than one sequence of "
            f"model.context_length + 1 = {context_length + 1}: {', '.join(ways)}"
        )
