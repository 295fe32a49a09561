"""Text of a token store, decoded."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokengrow.data.corpus import Split
from tokengrow.data.store import TokenStore

TOKENS_PER_CHUNK = 2**20
"""Tokens read from a store in one call."""


@dataclass(frozen=True)
class StoredText:
    """A `Text` from a token store: the decoded token ids of each document.

    For a byte-level tokenizer this is the document itself, for one that normalises the normal form.
    """

    store: TokenStore

    def documents(self, split: Split) -> Iterator[str]:
        """Yield the non-empty documents of a split in the order of the store."""
        tokens, tokenizer = self.store.split(split), self.store.tokenizer()
        ids: list[int] = []  # of the current document
        for start in range(0, len(tokens), TOKENS_PER_CHUNK):
            chunk = tokens.read(start, min(TOKENS_PER_CHUNK, len(tokens) - start))
            *ended, rest = np.split(chunk, np.flatnonzero(chunk == self.store.end_of_text) + 1)
            for part in ended:
                ids += part[:-1].tolist()
                if text := tokenizer.decode(ids):
                    yield text
                ids = []
            ids += rest.tolist()

    def identity(self) -> dict[str, Any]:
        """Return the identity of the text that the store was made from."""
        return self.store.identity
