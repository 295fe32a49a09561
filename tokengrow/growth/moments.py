"""The optimizer's state through a growth: every step's exact counterpart on Adam's moments.

The state is flat: `{slot}.{parameter name}` to a tensor, the slots being `exp_avg`, `exp_avg_sq`
(shaped like the parameter) and `step` (a scalar).
"""

from collections.abc import Callable

from tokengrow.growth.depth import deepen_moments
from tokengrow.growth.heads import add_head_moments
from tokengrow.growth.plan import GrowthPlan
from tokengrow.growth.tensors import State
from tokengrow.growth.tokens import append_moments
from tokengrow.growth.width import widen_moments
from tokengrow.model.config import ModelConfig

POWERS = {"exp_avg": 1, "exp_avg_sq": 2}
"""Adam's per-entry slots, and the power of the gradient that each averages."""
COUNT = "step"
"""Adam's slot per tensor: how often it was updated."""

MomentOperator = Callable[[State, ModelConfig, ModelConfig, int], State]

MOMENT_OPERATORS: dict[str, MomentOperator] = {
    "width": widen_moments,
    "heads": add_head_moments,
    "tokens": append_moments,
    "depth": deepen_moments,
}
"""Growth axis to the counterpart of its operator on one of Adam's moments."""


def grow_moments(state: State, plan: GrowthPlan) -> State:
    """Adam's state of the source, grown along the plan.

    Args:
        state: flat optimizer state, on the CPU; not modified.
        plan: the growth.

    Returns:
        The flat state of the target: old entries go on with their moments, new ones start from
        zero.
    """
    slots: dict[str, State] = {}
    for key, tensor in state.items():
        slot, _, name = key.partition(".")
        slots.setdefault(slot, {})[name] = tensor
    for slot, power in POWERS.items():
        for step in plan.steps:
            operator = MOMENT_OPERATORS[step.axis]
            slots[slot] = operator(slots.get(slot, {}), step.source, step.target, power)
    for step in plan.steps:
        if step.axis == "depth" and COUNT in slots:  # the one axis that bears whole tensors
            slots[COUNT] = deepen_moments(slots[COUNT], step.source, step.target, 0)
    return {f"{slot}.{name}": t for slot, tensors in slots.items() for name, t in tensors.items()}
