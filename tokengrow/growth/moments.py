"""The optimizer's state through a growth: every step's exact counterpart on Adam's moments.

The state is flat: `{slot}.{parameter name}` to a tensor, the slots being `exp_avg`, `exp_avg_sq`
(shaped like the parameter) and `step` (a scalar).
"""

from collections.abc import Callable

from tokengrow.growth.plan import GrowthPlan
from tokengrow.growth.tokens import State, append_moments
from tokengrow.model.config import ModelConfig

POWERS = {"exp_avg": 1, "exp_avg_sq": 2}
"""Adam's per-entry slots, and the power of the gradient that each averages."""

MomentOperator = Callable[[State, ModelConfig, ModelConfig, int], State]

MOMENT_OPERATORS: dict[str, MomentOperator] = {"tokens": append_moments}
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
    return {f"{slot}.{name}": t for slot, tensors in slots.items() for name, t in tensors.items()}
