"""tokengrow prune: a checkpoint back along the tokens axis, with lineage."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig
from rich.console import Console

from tokengrow.checkpoint.layout import step_folder
from tokengrow.checkpoint.store import Checkpoint, load_source, save_checkpoint
from tokengrow.cli.config import plain_values
from tokengrow.cli.runner import new_folder, run_command
from tokengrow.console.format import table
from tokengrow.data.loader import spread_batch
from tokengrow.data.open_tokens import open_checkpoint_tokens
from tokengrow.errors import UserError
from tokengrow.growth.checkpoint import prune_checkpoint
from tokengrow.growth.plan import KEPT
from tokengrow.growth.prune import plan_pruning
from tokengrow.model.architectures import KEY, as_tokenformer
from tokengrow.model.config import ModelConfig
from tokengrow.parsing import drop_nulls, parse_dataclass
from tokengrow.training.model_section import resolve_model


@dataclass(frozen=True, kw_only=True)
class PruneArguments:
    """The keys of prune.yaml."""

    source: str
    """Checkpoint, or run whose newest checkpoint is taken."""
    out: str
    """Folder that will hold the pruned checkpoint."""
    model: dict[str, Any]
    """Sizes wanted; null stands for the source's."""
    store: str | None
    """Token store of the text; null: the one that the source's run recorded."""
    batch_sequences: int
    """Training sequences that tokens are ranked on, and validation sequences of the drift."""

    def __post_init__(self) -> None:
        if self.batch_sequences < 1:
            raise UserError(f"batch_sequences must be at least 1, not {self.batch_sequences}")


def main(config: DictConfig) -> None:
    """Prunes `source` to `model` and writes the result, optimizer state included, into `out`."""
    arguments = parse_dataclass(PruneArguments, plain_values(config))
    out = new_folder(arguments.out)
    source = load_source(arguments.source)
    whole = as_tokenformer(source.config, "pruning takes away parameter tokens: it has none")
    target = resolve_pruning(arguments.model, whole)
    console = Console()
    tokens = open_checkpoint_tokens(arguments.store, source, console)
    text, probe = (
        spread_batch(
            tokens.sequences(split, source.config.context_length), arguments.batch_sequences
        )
        for split in ("train", "validation")
    )
    with console.status("ranking and pruning"):
        pruned = prune_checkpoint(source, target, text, probe)
        folder = save_checkpoint(out / step_folder(source.step), pruned)
    show(console, whole, target, pruned, folder)


def resolve_pruning(changes: dict[str, Any], source: ModelConfig) -> ModelConfig:
    """What the `model` section asks for.

    Raises:
        UserError: a key that is no number of tokens, or a target out of reach.
    """
    for key in (*KEPT, KEY):
        if key in drop_nulls(changes):
            raise UserError(f"model.{key} cannot be set here: pruning takes it from the source")
    return plan_pruning(source, cast(ModelConfig, resolve_model(changes, source)))


def show(
    console: Console, source: ModelConfig, target: ModelConfig, pruned: Checkpoint, folder: Path
) -> None:
    """Prints what was taken away, how far the function moved, and where the result is."""
    entry = pruned.lineage[-1]
    rows = table("Pruning", "key", ("before", "after", "contribution\nkept"))
    for role, kept in entry.settings["kept_contribution"].items():
        sizes = (getattr(config.tokens, role) for config in (source, target))
        rows.add_row(f"tokens.{role}", *(f"{size:,}" for size in sizes), f"{kept:.2%}")
    rows.add_section()
    rows.add_row("parameters", *(f"{c.num_parameters():,}" for c in (source, target)), "")
    console.print(rows)
    drift = entry.drift
    console.print(
        f"not the same function: over {drift.probe_tokens:,} validation tokens, in "
        f"{drift.dtype},\nloss {drift.loss_source:.5f} -> {drift.loss_grown:.5f} nats per "
        f"token, KL divergence {drift.kl:.2e}, largest |Δ logit| {drift.max_logit:.1e}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"checkpoint  {folder}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_command("prune", main)
