"""Tests of the text of a token store."""

import pytest

from tokengrow.data import stored_text
from tokengrow.data.corpus import TextCorpus
from tokengrow.data.store import TokenStore
from tokengrow.data.store_record import SPLITS
from tokengrow.data.stored_text import StoredText


@pytest.mark.parametrize("chunk", [2**20, 1000, 1])
def test_documents_equal_those_of_corpus(
    store: TokenStore, corpus: TextCorpus, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_text, "TOKENS_PER_CHUNK", chunk)
    for split in SPLITS if chunk > 1 else ("validation",):
        assert [*StoredText(store).documents(split)] == [*corpus.documents(split)]
    assert StoredText(store).identity() == store.identity
