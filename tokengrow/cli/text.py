"""The text that the `data` section of a verb names, where documents are wanted and not batches."""

from tokengrow.checkpoint.store import Checkpoint
from tokengrow.cli.resolve import MEGATRON, MIXTURE, Values, resolve_corpus
from tokengrow.data.corpus import Corpus
from tokengrow.errors import UserError


def resolve_text(values: Values, source: Checkpoint) -> Corpus:
    """The text source of the `data` section; of `data=same`, that of the source's run.

    Args:
        values: the section.
        source: what is evaluated.

    Raises:
        UserError: no text: token files, several texts, or a run that recorded none.
    """
    ways = "give a text, for example data=text data.files=[FILE]"
    place = f"data={values['source']}" if values.get("source") else "data=same"
    if values.get("source") is None:
        recorded = source.run.get("tokens_from")
        if not recorded:
            raise UserError(f"data=same: source records no text, as no run made it: {ways}")
        if recorded["store"]:
            raise UserError(
                f"data=same: the source's run took its tokens from store={recorded['store']}, "
                f"and documents are wanted as text: {ways}"
            )
        values = recorded["data"]
        place += f" is data={values['source']}, which"
    if values["source"] == MEGATRON:
        raise UserError(f"{place} holds token ids, and documents are wanted as text: {ways}")
    if values["source"] == MIXTURE:
        raise UserError(f"{place} is several texts: give the data= of one of its sources")
    return resolve_corpus(values)
