"""tokengrow grow: grow a checkpoint once, and verify the result."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from tokengrow.checkpoint.layout import step_folder
from tokengrow.checkpoint.store import Checkpoint, load_source
from tokengrow.cli.config import plain_values
from tokengrow.cli.runner import new_folder, run_command
from tokengrow.console.format import empty_table
from tokengrow.data.loader import probe_batch
from tokengrow.data.mixture import open_store
from tokengrow.errors import UserError
from tokengrow.growth.checkpoint import TensorStream, grow_checkpoint_on_disk
from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.plan import GrowthPlan
from tokengrow.growth.verify import TOLERANCE
from tokengrow.model.architectures import as_tokenformer
from tokengrow.parsing import parse_dataclass
from tokengrow.training.model_section import resolve_growth


@dataclass(frozen=True, kw_only=True)
class GrowArguments:
    """Keys of grow.yaml."""

    source: str
    """Checkpoint, or run whose newest checkpoint is used."""
    out: str
    """Directory for the grown checkpoint."""
    model: dict[str, Any]
    """Target sizes; null keeps the value of the source."""
    growth: GrowthConfig
    """Initialisation of new parameters and drift tolerance."""
    store: str | None
    """Token store whose validation tokens verify the growth; null: random tokens."""


def main(config: DictConfig) -> None:
    """Grow `source` to `model`, with its optimizer state, and write the result to `out`."""
    arguments = parse_dataclass(GrowArguments, plain_values(config))
    out = new_folder(arguments.out)
    source = load_source(arguments.source, streamed=True)
    plan = resolve_growth(arguments.model, source.config, config=arguments.growth)
    if not plan.steps:
        size = as_tokenformer(source.config, "Train each size from scratch.")
        raise UserError(
            "model must be larger than source, got the same sizes. Set a larger one, for example "
            f"model.tokens.ffn={2 * size.tokens.ffn}."
        )
    console = Console()
    probe = _probe(arguments.store, source.config.context_length)
    with Progress(console=console, transient=True) as progress:

        def watch(tensors: TensorStream, description: str, total: int) -> TensorStream:
            return progress.track(tensors, total=total, description=description)

        grown = grow_checkpoint_on_disk(source, plan, out / step_folder(source.step), probe, watch)
    show(console, plan, grown, tokens="validation" if arguments.store else "random")


def _probe(store: str | None, context_length: int) -> Tensor | None:
    """Return validation tokens [2, T + 1] of a store; None if no store is given."""
    if store is None:
        return None
    return probe_batch(open_store(Path(store)).sequences("validation", context_length))


def _number(value: int | float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def show(console: Console, plan: GrowthPlan, grown: Checkpoint, tokens: str) -> None:
    """Print the changed sizes, the drift, and the path of the result."""
    rows = empty_table("Growth", "key", ("before", "after"))
    for step in plan.steps:
        for key, (before, after) in step.changes.items():
            rows.add_row(key, *(_number(value) for value in (before, after)))
    rows.add_section()
    sizes = plan.source.num_parameters(), plan.target.num_parameters()
    rows.add_row("parameters", *(f"{size:,}" for size in sizes))
    console.print(rows)
    drift = grown.lineage[-1].drift
    console.print(
        f"logits moved by at most {drift.max_logit:.1e} over {drift.probe_tokens} {tokens} "
        f"tokens, in {drift.dtype}",
        highlight=False,
        soft_wrap=True,
    )
    if drift.relative > TOLERANCE[torch.float32]:
        console.print(
            f"not the same function: loss {drift.loss_source:.5f} -> {drift.loss_grown:.5f} "
            f"nats per token on them, KL divergence {drift.kl:.2e}",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"checkpoint  {grown.folder}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_command("grow", main)
