"""The documents of a token store as text again."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokengrow.data.corpus import Split
from tokengrow.data.store import TokenStore

TOKENS_AT_ONCE = 2**20
"""Read from a store at a time."""


@dataclass(frozen=True)
class StoredText:
    """A `Text` out of a token store: what its tokenizer made of each document, decoded.

    Of a byte-level tokenizer that is the document itself, of one that normalises the normal form.
    """

    store: TokenStore

    def documents(self, split: Split) -> Iterator[str]:
        """The documents of a split in the order of the store, none of them empty."""
        tokens, tokenizer = self.store.split(split), self.store.tokenizer()
        ids: list[int] = []  # of the document at hand
        for start in range(0, len(tokens), TOKENS_AT_ONCE):
            piece = tokens.read(start, min(TOKENS_AT_ONCE, len(tokens) - start))
            *whole, rest = np.split(piece, np.flatnonzero(piece == self.store.end_of_text) + 1)
            for part in whole:
                ids += part[:-1].tolist()
                if text := tokenizer.decode(ids):
                    yield text
                ids = []
            ids += rest.tolist()

    def identity(self) -> dict[str, Any]:
        """That of the text that the store was made from."""
        return self.store.identity
