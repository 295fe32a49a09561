"""A token store read as the documents that it was made from."""

import pytest

from tokengrow.data import stored_text as stored
from tokengrow.data.corpus import TextCorpus
from tokengrow.data.store import TokenStore
from tokengrow.data.store_record import SPLITS
from tokengrow.data.stored_text import StoredText


@pytest.mark.parametrize("at_once", [2**20, 1000, 1])
def test_the_documents_are_those_of_the_corpus(
    store: TokenStore, corpus: TextCorpus, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "TOKENS_AT_ONCE", at_once)
    for split in SPLITS if at_once > 1 else ("validation",):
        assert [*StoredText(store).documents(split)] == [*corpus.documents(split)]
    assert StoredText(store).identity() == store.identity
