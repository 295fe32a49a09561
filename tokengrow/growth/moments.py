"""The optimizer's state through a growth: every step's exact counterpart on Adam's moments.

The state is flat: `{slot}.{parameter name}` to a tensor, the slots being `exp_avg`, `exp_avg_sq`
(shaped like the parameter) and `step` (a scalar).
"""

from torch import Tensor

from tokengrow.growth.plan import GrowthPlan
from tokengrow.growth.tokens import append_moments

State = dict[str, Tensor]

MOMENT_OPERATORS = {"tokens": append_moments}


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
    for slot in ("exp_avg", "exp_avg_sq"):
        for step in plan.steps:
            moments = slots.get(slot, {})
            slots[slot] = MOMENT_OPERATORS[step.axis](moments, step.source, step.target)
    return {f"{slot}.{name}": t for slot, tensors in slots.items() for name, t in tensors.items()}
