"""tokengrow plan: sizes, FLOPs, memory, tokens and hours of a run before it starts."""

import json
import math
from dataclasses import dataclass, fields
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from tokengrow.checkpoint.store import load_source
from tokengrow.cli.config import plain_values
from tokengrow.cli.plan_tables import tables
from tokengrow.cli.runner import run_command
from tokengrow.distributed.fabric import FabricConfig
from tokengrow.errors import UserError
from tokengrow.growth.config import GrowthConfig
from tokengrow.parsing import MISSING_VALUE, drop_nulls, parse_dataclass
from tokengrow.planning.cost import Budget, growth_budget, model_budget, run_budget
from tokengrow.planning.profiling import measure_throughput
from tokengrow.training.model_section import resolve_growth, resolve_model
from tokengrow.training.recipe import Values, resolve_train

MEASURED = "measured"
"""Value of `flops_per_second` that requests a measurement."""


@dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """Keys of plan.yaml that run.yaml does not have."""

    flops_per_second: str | None
    """FLOP/s as a number, or `measured`; null: no hours."""
    json: bool
    """Whether to print JSON instead of tables."""

    def __post_init__(self) -> None:
        if self.flops_per_second in (None, MEASURED):
            return
        try:
            given = float(str(self.flops_per_second))
        except ValueError:
            given = math.nan
        if not 0 < given < math.inf:
            raise UserError(
                f"flops_per_second must be a number above 0 (FLOP/s) or {MEASURED}, got "
                f"{self.flops_per_second}. Write for example 4e14."
            )


@dataclass(frozen=True, kw_only=True)
class GrowthArguments:
    """Keys of plan.yaml that describe one model or one growth."""

    source: str | None
    """Checkpoint, or run whose newest checkpoint is used."""
    model: dict[str, Any]
    """Target sizes; null keeps the value of the source."""
    growth: GrowthConfig
    """Growth settings."""
    micro_batch_size: int
    """Sequences per forward pass, for the memory of activations."""
    fabric: FabricConfig
    """Precision, for the memory of training."""


def main(config: DictConfig) -> None:
    """Print the plan of a recipe, of one growth of `source`, or of one model."""
    _need_no_data(config)
    values = plain_values(config)
    own = parse_dataclass(
        PlanArguments, {item.name: values.pop(item.name) for item in fields(PlanArguments)}
    )
    if values["stages"]:
        budget = _run(values, own.flops_per_second)
    else:
        keys = [item.name for item in fields(GrowthArguments)]
        budget = _growth(parse_dataclass(GrowthArguments, {key: values[key] for key in keys}))
    if own.json:
        print(json.dumps(budget.to_dict(), indent=2))
        return
    console = Console(highlight=False)
    for shown in tables(budget):
        console.print(shown)


def _need_no_data(config: DictConfig) -> None:
    """Allow missing values in `data` and `tokenizer`, because planning reads no tokens."""
    for section in (config.data, config.tokenizer):
        for key in section:
            try:
                section[key]
            except OmegaConfBaseException:
                section[key] = MISSING_VALUE


def _run(values: Values, flops_per_second: str | None) -> Budget:
    """Return the plan of the stages of a recipe."""
    run = resolve_train(values)
    source = load_source(run.source, tensors=False).config if run.source else None
    if flops_per_second is None:
        return run_budget(run, source)
    if flops_per_second == MEASURED:
        speed = measure_throughput(run, Console(stderr=True))
        return run_budget(run, source, speed.flops_per_second, speed.device)
    given = dict.fromkeys((stage.name for stage in run.stages), float(flops_per_second))
    return run_budget(run, source, given)


def _growth(arguments: GrowthArguments) -> Budget:
    """Return the plan of one growth, or of one model."""
    batch, precision = arguments.micro_batch_size, arguments.fabric.chosen_precision
    if arguments.source is not None:
        source = load_source(arguments.source, tensors=False).config
        plan = resolve_growth(arguments.model, source, config=arguments.growth)
        return growth_budget(plan, batch, precision)
    if not drop_nulls(arguments.model):
        raise UserError("There is nothing to plan. Give recipes=NAME, model=NAME, or source=DIR.")
    return model_budget(resolve_model(arguments.model), batch, precision)


if __name__ == "__main__":
    run_command("plan", main)
