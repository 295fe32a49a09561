"""The tokens of a checkpoint's text: those of a store, or what its run recorded."""

from pathlib import Path

from rich.console import Console

from tokengrow.checkpoint.store import Checkpoint
from tokengrow.cli.resolve import Recipe, TrainArguments
from tokengrow.cli.train import open_tokens
from tokengrow.data.mixture import open_store
from tokengrow.data.sequences import TokenSource
from tokengrow.errors import UserError
from tokengrow.optim.config import OptimConfig
from tokengrow.training.config import StageConfig, TrainConfig


def open_source_tokens(store: str | None, source: Checkpoint, console: Console) -> TokenSource:
    """The tokens of the store that is given, else those that the source was trained on.

    Raises:
        UserError: neither can be opened, or its tokens are another tokenizer's.
    """
    tokens = open_store(Path(store)) if store else _recorded_tokens(source, console)
    place = f"store={store}" if store else "the text of the source's run"
    theirs = source.tokenizer not in (None, tokens.tokenizer().to_json())
    if theirs or tokens.vocab_size > source.config.vocab_size:
        raise UserError(
            f"{place} holds the tokens of another tokenizer than the source's: give a store= that "
            "was made with the source's tokenizer.json"
        )
    return tokens


def _recorded_tokens(source: Checkpoint, console: Console) -> TokenSource:
    """The text that the source's run recorded, in the source's own tokens."""
    recorded = source.run.get("tokens_from")
    if not recorded:
        raise UserError("source records no text, as no run made it: give store=DIR")
    stage = StageConfig(name="recorded", steps=1, model=source.config, optim=OptimConfig())
    run = TrainConfig(
        out="",
        stages=(stage,),
        source=str(source.folder),
        seed=source.run["seed"],
        batch_size=source.run["batch_size"],
        micro_batch_size=source.run["micro_batch_size"],
    )
    recipe = Recipe(
        name=stage.name,
        source=run.source,
        stages={},
        model={},
        optim={},
        batch_size=run.batch_size,
        max_steps_per_stage=None,
        store=recorded["store"],
        data=recorded["data"],
        tokenizer={},  # that of the source
        prompt="",
    )
    try:
        return open_tokens(TrainArguments(run=run, recipe=recipe), console)
    except UserError as error:
        raise UserError(
            f"the text of the source's run cannot be opened ({error}): give store=DIR"
        ) from None
