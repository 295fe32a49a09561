"""Growth of the optimizer state: Adam's moments along every axis, and the age of each entry.

The state is flat: `{slot}.{parameter name}` to a tensor. Adam's slots are `exp_avg` and
`exp_avg_sq` (shaped like the parameter) and `step` (a scalar). A grown model also has `row_age` [N]
and `column_age` [D]: the optimizer updates since the row or the column was added. On every axis, an
entry is as old as the younger of its row and its column. Two vectors therefore give the age of each
entry without splitting a tensor. A one-dimensional parameter has only `row_age`.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from tokengrow.checkpoint.tensors import StateDict
from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.depth import grow_depth_moments
from tokengrow.growth.heads import grow_heads_moments
from tokengrow.growth.plan import GrowthPlan
from tokengrow.growth.tokens import grow_tokens_moments
from tokengrow.growth.width import grow_width_moments
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import weight_shapes

MOMENT_POWERS = {"exp_avg": 1, "exp_avg_sq": 2}
"""Adam's per-entry slots to the power of the gradient that each averages."""
STEP = "step"
"""Adam's per-tensor slot: the number of its updates."""
ADAM_SLOTS = (STEP, *MOMENT_POWERS)
"""All slots of Adam."""
ROW_AGE, COLUMN_AGE = "row_age", "column_age"
ALL_SLOTS = (*ADAM_SLOTS, ROW_AGE, COLUMN_AGE)
"""All slots of the state of a grown model."""

MomentOperator = Callable[[StateDict, ModelConfig, ModelConfig, GrowthConfig, int], StateDict]

MOMENT_OPERATORS: dict[str, MomentOperator] = {
    "width": grow_width_moments,
    "heads": grow_heads_moments,
    "tokens": grow_tokens_moments,
    "depth": grow_depth_moments,
}
"""Growth axis to the function that grows one of Adam's moments along it."""


def grow_optimizer_state(
    plan: GrowthPlan, state: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield Adam's state after a growth, tensor by tensor.

    Args:
        plan: the growth; `plan.config.optimizer` decides whether moments are carried.
        state: flat optimizer state of the source, on the CPU; not modified. It is empty if the
            source was never trained.

    Yields:
        (key, tensor) of the flat state of the target. Old entries keep their moments, and new ones
        start from zero. Ages are included.
    """
    if not plan.steps:
        yield from state.items()
        return
    carry = plan.config.optimizer == "carry"
    shapes = weight_shapes(plan.source)
    for name in shapes:
        for slot, power in MOMENT_POWERS.items():
            if carry and (key := f"{slot}.{name}") in state:
                for grown, moment in _grow_moment(plan, name, state[key], power).items():
                    yield f"{slot}.{grown}", moment
    for name, shape in shapes.items():
        if carry and (key := f"{STEP}.{name}") in state:
            counts = {name: state[key]}
            for step in plan.steps:
                if step.axis == "depth":  # the only axis that adds complete tensors
                    counts = grow_depth_moments(counts, step.source, step.target, plan.config, 0)
            for grown, count in counts.items():
                yield f"{STEP}.{grown}", count
        yield from _grow_ages(plan, state, name, shape)


def _grow_moment(plan: GrowthPlan, name: str, tensor: Tensor, power: int) -> StateDict:
    """Grow one tensor of a slot; along depth it can become several tensors."""
    grown = {name: tensor}
    for step in plan.steps:
        operator = MOMENT_OPERATORS[step.axis]
        grown = operator(grown, step.source, step.target, plan.config, power)
    return grown


def _grow_ages(
    plan: GrowthPlan, state: Mapping[str, Tensor], name: str, shape: list[int]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (key, ages) of the tensors that one tensor of the source becomes; new rows have 0."""
    # Entries of the source are older than new ones, even if the source was never trained.
    age = max(float(state.get(f"{STEP}.{name}", 1)), 1.0)
    rows = state.get(f"{ROW_AGE}.{name}", torch.full(shape[:1], age))
    columns = state.get(f"{COLUMN_AGE}.{name}", torch.full(shape[1:], age))
    ages = torch.minimum(rows[:, None], columns) if len(shape) == 2 else rows
    for grown, each in _grow_moment(plan, name, ages, 0).items():
        yield f"{ROW_AGE}.{grown}", each.amax(1) if each.dim() == 2 else each
        if each.dim() == 2:
            yield f"{COLUMN_AGE}.{grown}", each.amax(0)
