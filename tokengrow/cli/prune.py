"""tokengrow prune: remove the parameter tokens that contribute least."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig
from rich.console import Console

from tokengrow.checkpoint.layout import step_folder
from tokengrow.checkpoint.store import Checkpoint, load_source, save_checkpoint
from tokengrow.cli.config import plain_values
from tokengrow.cli.runner import new_folder, run_command
from tokengrow.console.format import empty_table
from tokengrow.data.loader import evenly_spaced_batch
from tokengrow.data.open_tokens import open_checkpoint_tokens
from tokengrow.errors import UserError
from tokengrow.growth.checkpoint import prune_checkpoint
from tokengrow.growth.plan import INHERITED_FIELDS
from tokengrow.growth.prune import plan_pruning
from tokengrow.model.architectures import ARCHITECTURE_KEY, as_tokenformer
from tokengrow.model.config import ModelConfig
from tokengrow.parsing import drop_nulls, parse_dataclass
from tokengrow.training.model_section import resolve_model


@dataclass(frozen=True, kw_only=True)
class PruneArguments:
    """Keys of prune.yaml."""

    source: str
    """Checkpoint, or run whose newest checkpoint is used."""
    out: str
    """Directory for the pruned checkpoint."""
    model: dict[str, Any]
    """Target sizes; null keeps the value of the source."""
    store: str | None
    """Token store of the text; null: the one that the run of source recorded."""
    batch_sequences: int
    """Number of training sequences for the ranking, and of validation sequences for the drift."""

    def __post_init__(self) -> None:
        if self.batch_sequences < 1:
            raise UserError(f"batch_sequences must be at least 1, got {self.batch_sequences}.")


def main(composed: DictConfig) -> None:
    """Prune `source` to `model`, with its optimizer state, and write the result to `out`."""
    arguments = parse_dataclass(PruneArguments, plain_values(composed))
    out = new_folder(arguments.out)
    source = load_source(arguments.source)
    config = as_tokenformer(source.config, "Only parameter tokens can be pruned.")
    target = resolve_pruning(arguments.model, config)
    console = Console()
    tokens = open_checkpoint_tokens(arguments.store, source, console)
    text, probe = (
        evenly_spaced_batch(
            tokens.sequences(split, source.config.context_length), arguments.batch_sequences
        )
        for split in ("train", "validation")
    )
    with console.status("ranking and pruning"):
        pruned = prune_checkpoint(source, target, text, probe)
        folder = save_checkpoint(out / step_folder(source.step), pruned)
    show(console, config, target, pruned, folder)


def resolve_pruning(changes: dict[str, Any], source: ModelConfig) -> ModelConfig:
    """Return the target sizes of the `model` section.

    Raises:
        UserError: a key is set that pruning never changes, or the target cannot be reached.
    """
    for key in (*INHERITED_FIELDS, ARCHITECTURE_KEY):
        if key in drop_nulls(changes):
            raise UserError(
                f"model.{key} must be null, because pruning keeps the value of source. Remove it."
            )
    return plan_pruning(source, cast(ModelConfig, resolve_model(changes, source)))


def show(
    console: Console, source: ModelConfig, target: ModelConfig, pruned: Checkpoint, folder: Path
) -> None:
    """Print the removed tokens, the drift, and the path of the result."""
    entry = pruned.lineage[-1]
    rows = empty_table("Pruning", "key", ("before", "after", "contribution\nkept"))
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
