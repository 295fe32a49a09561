"""Tests of the text that a verb reads: the named one, or that of the source's run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tokengrow.checkpoint.schema import RecordedRun, TokensFrom
from tokengrow.checkpoint.store import Checkpoint, load_checkpoint
from tokengrow.data.corpus import StdlibCorpus, TextCorpus
from tokengrow.data.mixture import MixedSource, MixtureConfig, build_mixture
from tokengrow.data.open_tokens import resolve_text
from tokengrow.data.store import TokenStore
from tokengrow.data.stored_text import StoredText
from tokengrow.errors import UserError

INHERIT = {"source": None}
STDLIB = {"source": "stdlib", "validation_fraction": 0.25}
MEGATRON = {"source": "megatron", "prefix": "files/books"}
MIXED = {"source": "mixture", "sources": {"code": {"source": "stdlib"}}}


@pytest.fixture(scope="module")
def trained(source: Path) -> Checkpoint:
    return load_checkpoint(source, tensors=False)


def with_data(trained: Checkpoint, data: dict[str, Any], store: str | None = None) -> Checkpoint:
    """Return the checkpoint as if its run had used other data."""
    return replace(trained, run=RecordedRun(stages={}, tokens_from=TokensFrom(data, {}, store)))


def test_named_text_is_resolved(trained: Checkpoint) -> None:
    values = {"source": "text", "files": ["a.txt"], "text_key": "body"}
    assert resolve_text(values, trained) == TextCorpus(files=["a.txt"], text_key="body")


def test_inherited_text_is_that_of_source_run(trained: Checkpoint) -> None:
    found = resolve_text(INHERIT, with_data(trained, STDLIB))
    assert found == StdlibCorpus(validation_fraction=0.25)


def test_inherited_store_is_decoded(trained: Checkpoint, store: TokenStore) -> None:
    assert resolve_text(INHERIT, trained) == StoredText(store)


def test_inherited_mixture_store_is_rejected(
    trained: Checkpoint, store: TokenStore, tmp_path: Path
) -> None:
    sources = {"books": MixedSource(store=str(store.folder))}
    build_mixture(MixtureConfig(sources=sources), store.tokenizer(), tmp_path / "mixed")
    with pytest.raises(UserError, match=r"^data=inherit is store=.*mixed, a mixture of several"):
        resolve_text(INHERIT, with_data(trained, STDLIB, str(tmp_path / "mixed")))


def test_model_without_run_has_no_inherited_text(trained: Checkpoint) -> None:
    with pytest.raises(
        UserError, match=r"^data=inherit needs recorded data, but no run wrote source"
    ):
        resolve_text(INHERIT, replace(trained, run=None))


def test_token_files_and_mixtures_are_rejected(trained: Checkpoint) -> None:
    with pytest.raises(UserError, match=r"^data=megatron holds token ids"):
        resolve_text(MEGATRON, trained)
    with pytest.raises(UserError, match=r"^data=inherit is data=megatron, which holds token ids"):
        resolve_text(INHERIT, with_data(trained, MEGATRON))
    with pytest.raises(
        UserError, match=r"^data=mixture holds several texts. Give the data= of one"
    ):
        resolve_text(MIXED, trained)
    with pytest.raises(
        UserError, match=r"^data=inherit is data=mixture, which holds several texts"
    ):
        resolve_text(INHERIT, with_data(trained, MIXED))
