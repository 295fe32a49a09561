"""tokengrow plan: parameters, FLOPs, memory and tokens, without building a model."""

from dataclasses import dataclass, fields
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from tokengrow.checkpoint.store import load_checkpoint
from tokengrow.cli.resolve import (
    plain,
    resolve_growth,
    resolve_model,
    resolve_train,
    without_nulls,
)
from tokengrow.cli.verb import run_verb
from tokengrow.errors import UserError
from tokengrow.evaluation.format import bytes_text, count, table
from tokengrow.model.config import ModelConfig
from tokengrow.training.ladder import TrainConfig
from tokengrow.training.memory import checkpoint_bytes, training_bytes
from tokengrow.typed import typed


@dataclass(frozen=True, kw_only=True)
class GrowthArguments:
    """The keys of plan.yaml that describe one model or one growth."""

    source: str | None
    """Checkpoint, or run whose newest checkpoint is taken."""
    model: dict[str, Any]
    """Sizes wanted; null stands for the source's."""
    micro_batch_size: int
    """Sequences whose activations count as training memory."""


GROWTH_KEYS = [item.name for item in fields(GrowthArguments)]


def main(config: DictConfig) -> None:
    """Prints a recipe's stages, one growth of `source`, or the sizes of one model."""
    values = plain(config)
    console = Console(highlight=False)
    if values["stages"]:
        console.print(ladder_table(resolve_train(values).run))
        return
    arguments = typed(GrowthArguments, {key: values[key] for key in GROWTH_KEYS})
    if arguments.source is None and not without_nulls(arguments.model):
        raise UserError("nothing to plan: give recipes=NAME, model=NAME, or source=DIR")
    if arguments.source is None:
        console.print(sizes_table({"model": resolve_model(arguments.model)}, arguments))
        return
    source = load_checkpoint(arguments.source, tensors=False).config
    target = resolve_growth(arguments.model, source).target
    models = {"source": source} if target == source else {"source": source, "grown": target}
    console.print(sizes_table(models, arguments))


SIZES = ("parameters", "FLOPs\n/token", "checkpoint", "training\nmemory")
AMOUNTS = ("steps", "tokens", "FLOPs")


def ladder_table(run: TrainConfig) -> Table:
    """One row per stage of a run, and their sum."""
    rows = table(_title(run.micro_batch_size), "stage", (*SIZES, *AMOUNTS))
    steps = tokens = flops = 0
    for stage in run.stages:
        stage_tokens = stage.steps * run.batch_size * stage.model.context_length
        stage_flops = stage_tokens * stage.model.flops_per_token()
        steps, tokens, flops = steps + stage.steps, tokens + stage_tokens, flops + stage_flops
        sizes = _sizes(stage.model, run.micro_batch_size)
        rows.add_row(stage.name, *sizes, *_amounts(stage.steps, stage_tokens, stage_flops))
    rows.add_section()
    rows.add_row("total", *[""] * len(SIZES), *_amounts(steps, tokens, flops))
    if early := [stage.name for stage in run.stages if stage.plateau is not None]:
        rows.caption = f"at most: {', '.join(early)} may end before, at a plateau"
    return rows


def sizes_table(models: dict[str, ModelConfig], arguments: GrowthArguments) -> Table:
    """One row per named model."""
    rows = table(_title(arguments.micro_batch_size), "model", SIZES)
    for name, model in models.items():
        rows.add_row(name, *_sizes(model, arguments.micro_batch_size))
    return rows


def _title(micro_batch_size: int) -> str:
    return f"Plan (memory in float32, micro-batch {micro_batch_size})"


def _sizes(model: ModelConfig, micro_batch_size: int) -> tuple[str, ...]:
    return (
        f"{model.num_parameters():,}",
        count(model.flops_per_token()),
        bytes_text(checkpoint_bytes(model)),
        bytes_text(training_bytes(model, micro_batch_size)),
    )


def _amounts(steps: int, tokens: int, flops: int) -> tuple[str, ...]:
    return f"{steps:,}", count(tokens), f"{flops:.2e}".replace("e+", "e")


if __name__ == "__main__":
    run_verb("plan", main)
