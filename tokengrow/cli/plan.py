"""tokengrow plan: parameters, FLOPs, memory and tokens of a recipe or a growth, without building a
model."""

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from tokengrow.checkpoint.store import load_checkpoint
from tokengrow.cli.resolve import plain, refuse_kept, resolve_model, resolve_train
from tokengrow.cli.verb import run_verb
from tokengrow.errors import UserError
from tokengrow.growth.plan import plan_growth
from tokengrow.model.config import ModelConfig
from tokengrow.training.ladder import TrainConfig
from tokengrow.training.memory import checkpoint_bytes, training_bytes


def main(config: DictConfig) -> None:
    """Prints a recipe's stages, or the sizes before and after one growth of `source`."""
    values = plain(config)
    console = Console(highlight=False)
    if values["stages"]:
        run = resolve_train(values)
        console.print(ladder_table(run))
        return
    if values["source"] is None:
        raise UserError("nothing to plan: give recipes=NAME, or source=DIR and model=NAME")
    source = load_checkpoint(values["source"]).config
    refuse_kept(values["model"], "model")
    target = plan_growth(source, resolve_model(values["model"], source)).target
    console.print(growth_table(source, target, values["micro_batch_size"]))


def ladder_table(run: TrainConfig) -> Table:
    """One row per stage of a run."""
    table = _table(f"Plan, micro-batches of {run.micro_batch_size} sequences", "stage")
    for column in ("steps", "tokens", "FLOPs", "FLOPs so far"):
        table.add_column(column, justify="right")
    total = 0
    for stage in run.stages:
        tokens = stage.steps * run.batch_size * stage.model.context_length
        flops = tokens * stage.model.flops_per_token()
        total += flops
        row = _sizes(stage.model, run.micro_batch_size)
        table.add_row(
            stage.name, *row, f"{stage.steps:,}", f"{tokens:,}", f"{flops:.3g}", f"{total:.3g}"
        )
    return table


def growth_table(source: ModelConfig, target: ModelConfig, micro_batch_size: int) -> Table:
    """The sizes before and after one growth."""
    table = _table(f"Plan, micro-batches of {micro_batch_size} sequences", "model")
    table.add_row("source", *_sizes(source, micro_batch_size))
    if target != source:
        table.add_row("grown", *_sizes(target, micro_batch_size))
    return table


def _table(title: str, first: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for column in ("parameters", "FLOPs/token", "checkpoint", "training memory"):
        table.add_column(column, justify="right")
    return table


def _sizes(model: ModelConfig, micro_batch_size: int) -> tuple[str, str, str, str]:
    return (
        f"{model.num_parameters():,}",
        f"{model.flops_per_token():.3g}",
        _bytes(checkpoint_bytes(model)),
        _bytes(training_bytes(model, micro_batch_size)),
    )


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1000:.0f} kB"


if __name__ == "__main__":
    run_verb("plan", main)
