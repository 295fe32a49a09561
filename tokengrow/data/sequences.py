"""A split of tokens as training meets it: a stream on the disk, cut into sequences."""

from bisect import bisect_right
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

    Args:
        files: the shards in order.
        lengths: tokens in each shard.
        dtype: NumPy's name of the type of an id.
        first: tokens of the first shard that lie before the split.
    """

    def __init__(self, files: list[Path], lengths: list[int], dtype: str, first: int = 0) -> None:
        self._files, self._dtype, self._first = files, dtype, first
        self._ends = list(accumulate(lengths))
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens ``start`` to ``start + length`` as int64 [length], across shards where need be.

        Raises:
            IndexError: a part of the range lies outside.
        """
        if start < 0 or length < 0 or start + length > len(self):
            raise IndexError(f"tokens {start} to {start + length} of a split of {len(self)}")
        result = np.empty(length, dtype=np.int64)
        done = 0
        while done < length:
            shard = bisect_right(self._ends, start + done)
            offset = start + done - (self._ends[shard - 1] if shard else 0)
            piece = self._map(shard)[offset : offset + length - done]
            result[done : done + len(piece)] = piece
            done += len(piece)
        return result

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            skipped = 0 if shard else self._first * np.dtype(self._dtype).itemsize
            self._maps[shard] = np.memmap(self._files[shard], self._dtype, "r", skipped)
        return self._maps[shard]

    def __getstate__(self) -> dict[str, Any]:
        # A memory map is pickled as the whole of its content; a loader's worker maps the file anew.
        return {**self.__dict__, "_maps": {}}


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
