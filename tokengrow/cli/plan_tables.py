"""Tables of `tokengrow plan`."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from tokengrow.console.format import (
    empty_table,
    format_bytes,
    format_count,
    format_power,
    format_three_digits,
)
from tokengrow.growth.plan import AXES
from tokengrow.model.config import ROLES
from tokengrow.planning.cost import Budget, SizeChange


def tables(budget: Budget) -> Iterator[Table]:
    """Yield the tables of a plan, each at most 80 columns wide."""
    yield _sizes(budget)
    if any(rung.appended for rung in budget.rungs):
        yield _growths(budget)
    yield _memory(budget)
    if budget.total:
        yield _cost(budget)


def _name(budget: Budget) -> str:
    return "stage" if budget.total else "model"


def _sizes(budget: Budget) -> Table:
    scratch = f"FLOPs from scratch\n({format_count(budget.scratch_tokens)} tokens)"
    rows = empty_table(
        "Sizes", _name(budget), ("parameters", "FLOPs\n/token", scratch, "checkpoint\non disk")
    )
    for rung in budget.rungs:
        rows.add_row(
            rung.name,
            f"{rung.parameters:,}",
            format_count(rung.flops_per_token),
            format_power(rung.scratch_flops),
            format_bytes(rung.checkpoint_bytes),
        )
    return rows


def _growths(budget: Budget) -> Table:
    """Return the table of appended sizes, with a column for each axis that grows."""
    steps = {rung.name: {step.axis: step for step in rung.appended} for rung in budget.rungs}
    axes = [axis for axis in AXES if any(axis in grown for grown in steps.values())]
    rows = empty_table("Appended sizes", _name(budget), ())
    for axis in axes:
        rows.add_column("layers" if axis == "depth" else axis)
    for name, grown in steps.items():
        if grown:
            rows.add_row(name, *(_change(grown[axis]) if axis in grown else "-" for axis in axes))
    return rows


def _change(step: SizeChange) -> str:
    """Format a growth step as `12 -> 24`, without unchanged keys (except tokens)."""
    if step.axis == "tokens":
        return f"{_tokens(step.before['tokens'])} -> {_tokens(step.after['tokens'])}"
    changed = [key for key in step.before if step.before[key] != step.after[key]]
    if changed == ["head_dim"]:
        changed = list(step.before)
    return " -> ".join(
        " x ".join(str(sizes[key]) for key in changed) for sizes in (step.before, step.after)
    )


def _tokens(counts: dict[str, Any]) -> str:
    """Format token counts as attention/FFN; if the counts of attention differ, all five roles."""
    *attention, ffn = (counts[role] for role in ROLES)
    return "/".join(map(str, [*(attention if len(set(attention)) > 1 else attention[:1]), ffn]))


def _memory(budget: Budget) -> Table:
    rows = empty_table(
        f"Memory of a training step ({budget.precision}, micro-batch {budget.micro_batch_size})",
        _name(budget),
        ("weights", "copies of\nweights", "gradients", "Adam's\nmoments", "activations", "total"),
    )
    for rung in budget.rungs:
        held = rung.memory
        parts = (held.weights, held.copies, held.gradients, held.moments, held.activations)
        rows.add_row(rung.name, *map(format_bytes, (*parts, held.total)))
    return rows


def _cost(budget: Budget) -> Table:
    assert budget.total
    timed = budget.total.hours is not None
    columns = ["steps", "tokens", "FLOPs", "cumulative\nFLOPs", "/ from\nscratch"]
    columns += ["FLOP/s", "hours"] if timed else []
    where = f", from a few measured steps on {budget.device}" if budget.device else ""
    rows = empty_table(f"Training{where}", "stage", tuple(columns))
    for rung in budget.rungs:
        stage = rung.stage
        assert stage
        amounts = [f"{stage.steps:,}", format_count(stage.tokens), format_power(stage.flops)]
        amounts += [
            format_power(stage.cumulative_flops),
            format_three_digits(stage.of_scratch),
        ]
        if stage.flops_per_second is not None and stage.hours is not None:
            amounts += [
                format_power(stage.flops_per_second),
                format_three_digits(stage.hours),
            ]
        rows.add_row(rung.name, *amounts)
    total = budget.total
    amounts = [f"{total.steps:,}", format_count(total.tokens), format_power(total.flops)]
    if total.hours is not None:
        amounts += ["", "", "", format_three_digits(total.hours)]
    rows.add_section()
    rows.add_row("total", *amounts)
    if early := [rung.name for rung in budget.rungs if rung.stage and rung.stage.may_end_before]:
        rows.caption = f"Maximum: {', '.join(early)} may end earlier at a plateau."
    return rows
