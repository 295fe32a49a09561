"""The text that the `data` section of a verb names, where documents are wanted and not batches."""

from pathlib import Path

from tokengrow.checkpoint.store import Checkpoint
from tokengrow.cli.resolve import MEGATRON, MIXTURE, Values, resolve_corpus
from tokengrow.data.corpus import Text
from tokengrow.data.mixture import open_store
from tokengrow.data.store import TokenStore
from tokengrow.data.stored_text import StoredText
from tokengrow.errors import UserError


def resolve_text(values: Values, source: Checkpoint) -> Text:
    """The text of the `data` section; of `data=same`, that of the source's run.

    Args:
        values: the section.
        source: what is evaluated.

    Raises:
        UserError: no text: token files, several texts, or a run that recorded none.
    """
    same = values["source"] is None
    values = text_values(values, source)
    if same and "store" in values:
        return _stored(values["store"])
    place = f"data=same is data={values['source']}, which" if same else f"data={values['source']}"
    if values["source"] == MEGATRON:
        raise UserError(
            f"{place} holds token ids, and documents are wanted as text: name the text that they "
            "were made of, for example data=text data.files=[FILE]"
        )
    if values["source"] == MIXTURE:
        raise UserError(f"{place} is several texts: give the data= of one of its sources")
    return resolve_corpus(values)


def text_values(values: Values, source: Checkpoint) -> Values:
    """The `data` section as a record names it; for `data=same`, what the source's run recorded.

    Raises:
        UserError: it recorded nothing.
    """
    if values["source"] is not None:
        return values
    recorded = source.run.get("tokens_from")
    if not recorded:
        raise UserError(
            "data=same: source records no text, as no run made it: name one, for example "
            "data=text data.files=[FILE]"
        )
    return {"store": recorded["store"]} if recorded["store"] else recorded["data"]


def _stored(folder: str) -> StoredText:
    """The text of a store that a run was trained on."""
    store = open_store(Path(folder))
    if not isinstance(store, TokenStore):
        raise UserError(
            f"data=same: the source's run took its tokens from store={folder}, a mixture of "
            "several texts: give the data= of one of them"
        )
    return StoredText(store)
