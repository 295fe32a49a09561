"""The optimizer's state through a growth: every step's exact counterpart on Adam's moments, and how
old each entry is.

The state is flat: `{slot}.{parameter name}` to a tensor. The slots are Adam's, `exp_avg`,
`exp_avg_sq` (shaped like the parameter) and `step` (a scalar), and, of a model that was grown,
`row_age` [N] and `column_age` [D]: the optimizer updates since the row, or the column, is there. An
entry is as old as the younger of the two, on every axis, so two vectors tell the age of each
without splitting a tensor. (Of a vector there is `row_age` alone.)
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.depth import deepen_moments
from tokengrow.growth.heads import add_head_moments
from tokengrow.growth.plan import GrowthPlan
from tokengrow.growth.tensors import State
from tokengrow.growth.tokens import append_moments
from tokengrow.growth.width import widen_moments
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import weight_shapes

POWERS = {"exp_avg": 1, "exp_avg_sq": 2}
"""Adam's per-entry slots, and the power of the gradient that each averages."""
COUNT = "step"
"""Adam's slot per tensor: how often it was updated."""
ROW_AGE, COLUMN_AGE = "row_age", "column_age"
ALL_SLOTS = (*POWERS, COUNT, ROW_AGE, COLUMN_AGE)

MomentOperator = Callable[[State, ModelConfig, ModelConfig, GrowthConfig, int], State]

MOMENT_OPERATORS: dict[str, MomentOperator] = {
    "width": widen_moments,
    "heads": add_head_moments,
    "tokens": append_moments,
    "depth": deepen_moments,
}
"""Growth axis to the counterpart of its operator on one of Adam's moments."""


def grown_moments(plan: GrowthPlan, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Adam's state of the source, grown along the plan, tensor by tensor.

    Args:
        plan: the growth; its config says whether moments are carried along.
        state: flat optimizer state, on the CPU; not modified. Of a source that was never trained it
            is empty.

    Yields:
        (key, tensor) of the flat state of the target: old entries go on with their moments, new
        ones start from zero; and the age of each.
    """
    if not plan.steps:
        yield from state.items()
        return
    shapes = weight_shapes(plan.source)
    for name in shapes:
        for slot, power in POWERS.items():
            if plan.config.optimizer == "carry" and (key := f"{slot}.{name}") in state:
                for grown, moment in _through(plan, name, state[key], power).items():
                    yield f"{slot}.{grown}", moment
    for name, shape in shapes.items():
        if plan.config.optimizer == "carry" and (key := f"{COUNT}.{name}") in state:
            for grown, count in _counts(plan, name, state[key]).items():
                yield f"{COUNT}.{grown}", count
        yield from _grown_ages(plan, state, name, shape)


def _through(plan: GrowthPlan, name: str, tensor: Tensor, power: int) -> State:
    """What becomes of one tensor of the source: one of the target, or, by depth, several."""
    grown = {name: tensor}
    for step in plan.steps:
        operator = MOMENT_OPERATORS[step.axis]
        grown = operator(grown, step.source, step.target, plan.config, power)
    return grown


def _counts(plan: GrowthPlan, name: str, count: Tensor) -> State:
    """Of how often a tensor was updated: depth is the one axis that bears whole tensors."""
    grown = {name: count}
    for step in plan.steps:
        if step.axis == "depth":
            grown = deepen_moments(grown, step.source, step.target, plan.config, 0)
    return grown


def _grown_ages(
    plan: GrowthPlan, state: Mapping[str, Tensor], name: str, shape: list[int]
) -> Iterator[tuple[str, Tensor]]:
    """(key, ages) of what becomes of one tensor; what is new has age 0."""
    # Whatever was there before the growth is older than what comes, trained or not.
    age = max(float(state.get(f"{COUNT}.{name}", 1)), 1.0)
    rows = state.get(f"{ROW_AGE}.{name}", torch.full(shape[:1], age))
    columns = state.get(f"{COLUMN_AGE}.{name}", torch.full(shape[1:], age))
    ages = torch.minimum(rows[:, None], columns) if len(shape) == 2 else rows
    for grown, each in _through(plan, name, ages, 0).items():
        yield f"{ROW_AGE}.{grown}", each.amax(1) if each.dim() == 2 else each
        if each.dim() == 2:
            yield f"{COLUMN_AGE}.{grown}", each.amax(0)
