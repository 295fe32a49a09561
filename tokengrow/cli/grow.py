"""tokengrow grow: one growth of a checkpoint, verified, with lineage."""

from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tokengrow.checkpoint.layout import step_folder
from tokengrow.checkpoint.store import Checkpoint, load_checkpoint, save_checkpoint
from tokengrow.cli.resolve import plain, refuse_kept, resolve_model
from tokengrow.cli.verb import run_verb
from tokengrow.data.loader import check_sequences, probe_batch
from tokengrow.data.store import TokenStore
from tokengrow.errors import UserError
from tokengrow.growth.engine import GrowthConfig
from tokengrow.growth.plan import GrowthPlan, plan_growth
from tokengrow.model.config import ModelConfig
from tokengrow.training.boundary import grow_checkpoint
from tokengrow.typed import typed


def main(config: DictConfig) -> None:
    """Grows `source` to `model` and writes the result, optimizer state included, into `out`."""
    values = plain(config)
    out = Path(values["out"])
    if out.exists():
        raise UserError(f"out={out} exists already: choose another out=; nothing is overwritten")
    source = load_checkpoint(values["source"])
    refuse_kept(values["model"], "model")
    plan = plan_growth(source.config, resolve_model(values["model"], source.config))
    if not plan.steps:
        raise UserError(
            "model is the size that source has already: name a larger one, for example "
            f"model.tokens.ffn={2 * source.config.tokens.ffn}"
        )
    growth = typed(GrowthConfig, values["growth"], "growth")
    console = Console()
    with console.status("growing and verifying"):
        grown = grow_checkpoint(source, plan, growth, _probe(values["store"], source.config))
        folder = save_checkpoint(out / step_folder(source.step), grown)
    show(console, plan, grown, folder)


def _probe(store: str | None, config: ModelConfig) -> Tensor | None:
    """[2, T + 1] real validation tokens of a store, if one is given."""
    if store is None:
        return None
    tokens = TokenStore.open(Path(store)).split("validation")
    return probe_batch(check_sequences(tokens, config.context_length, "validation"))


def show(console: Console, plan: GrowthPlan, grown: Checkpoint, folder: Path) -> None:
    """Prints what changed, how far the function moved, and where the result is."""
    table = Table(title="Growth", title_justify="left")
    for column in ("axis", "key", "before", "after"):
        table.add_column(column, justify="right" if column in ("before", "after") else "left")
    for step in plan.steps:
        for key, (before, after) in step.changes.items():
            table.add_row(step.axis, key, f"{before:,}", f"{after:,}")
    sizes = plan.source.num_parameters(), plan.target.num_parameters()
    table.add_row("", "parameters", f"{sizes[0]:,}", f"{sizes[1]:,}", style="bold")
    console.print(table)
    drift = grown.lineage[-1]["drift"]
    console.print(
        f"same function: logits moved by at most {drift['max_logit']:.1e} ({drift['dtype']}, "
        f"{drift['probe_tokens']} tokens), loss {drift['loss_source']:.6f} -> "
        f"{drift['loss_grown']:.6f}",
        highlight=False,
    )
    console.print(f"checkpoint  {folder}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_verb("grow", main)
