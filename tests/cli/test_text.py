"""Which text a verb reads documents of: the one that is named, or that of the source's run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tokengrow.checkpoint.store import Checkpoint, load_checkpoint
from tokengrow.cli.text import resolve_text
from tokengrow.data.corpus import StdlibCorpus, TextCorpus
from tokengrow.errors import UserError

SAME = {"source": None}
STDLIB = {"source": "stdlib", "validation_fraction": 0.25}
MEGATRON = {"source": "megatron", "prefix": "files/books"}
MIXED = {"source": "mixture", "sources": {"code": {"source": "stdlib"}}}


@pytest.fixture(scope="module")
def trained(source: Path) -> Checkpoint:
    return load_checkpoint(source, tensors=False)


def recorded(trained: Checkpoint, data: dict[str, Any], store: str | None = None) -> Checkpoint:
    """The checkpoint of a run on other data."""
    return replace(trained, run={"tokens_from": {"data": data, "tokenizer": {}, "store": store}})


def test_the_text_that_is_named(trained: Checkpoint) -> None:
    values = {"source": "text", "files": ["a.txt"], "text_key": "body"}
    assert resolve_text(values, trained) == TextCorpus(files=["a.txt"], text_key="body")


def test_the_text_of_the_sources_run(trained: Checkpoint) -> None:
    found = resolve_text(SAME, recorded(trained, STDLIB))
    assert found == StdlibCorpus(validation_fraction=0.25)


def test_a_run_on_a_token_store_recorded_no_text(trained: Checkpoint) -> None:
    assert trained.run["tokens_from"]["store"], "as the fixture was trained"
    with pytest.raises(UserError, match=r"^data=same: .* store=.*: give a text, .* data=text"):
        resolve_text(SAME, trained)


def test_a_model_that_no_run_made_recorded_none_either(trained: Checkpoint) -> None:
    with pytest.raises(UserError, match=r"^data=same: source records no text"):
        resolve_text(SAME, replace(trained, run={}))


def test_token_files_and_mixtures_are_no_text(trained: Checkpoint) -> None:
    with pytest.raises(UserError, match=r"^data=megatron holds token ids"):
        resolve_text(MEGATRON, trained)
    with pytest.raises(UserError, match=r"^data=same is data=megatron, which holds token ids"):
        resolve_text(SAME, recorded(trained, MEGATRON))
    with pytest.raises(UserError, match=r"^data=mixture is several texts: give the data= of one"):
        resolve_text(MIXED, trained)
    with pytest.raises(UserError, match=r"^data=same is data=mixture, which is several texts"):
        resolve_text(SAME, recorded(trained, MIXED))
