"""Optimizer state as flat named tensors: collect it on rank 0, and load it."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from tokengrow.checkpoint.tensors import StateDict
from tokengrow.distributed.collectives import (
    broadcast_from_rank0,
    copy_to_host,
    first_holders,
    gather_to_rank0,
    scatter_from_rank0,
)
from tokengrow.errors import UserError
from tokengrow.growth.moments import ADAM_SLOTS, COLUMN_AGE, MOMENT_POWERS, ROW_AGE, STEP
from tokengrow.model.tokenformer import LanguageModel
from tokengrow.optim.adamw import AgedAdamW, Ages


def collect_optimizer_state(model: LanguageModel, optimizer: AgedAdamW) -> StateDict:
    """Return the optimizer state as `{slot}.{parameter name}` to a CPU tensor, on rank 0.

    Adam's slots exist after the first update, ages after the first growth.

    Args:
        model: model with the parameters, sharded or not.
        optimizer: optimizer of all parameters, or of those of this rank.
    """
    state = copy_to_host(_gather_moments(model, optimizer))
    ages = optimizer.ages()
    for name, parameter in model.named_parameters():
        if parameter in ages:
            each = ages[parameter]
            for slot, vector in ((ROW_AGE, each.rows), (COLUMN_AGE, each.columns)):
                if vector is not None:
                    state[f"{slot}.{name}"] = vector.float().cpu()
    return state


def load_optimizer_state(
    model: LanguageModel, optimizer: AgedAdamW, state: Mapping[str, Tensor]
) -> None:
    """Load the state that `collect_optimizer_state` returned.

    Args:
        model: model with the parameters, sharded or not.
        optimizer: optimizer of all parameters, or of those of this rank.
        state: flat state on rank 0; not read on other ranks.

    Raises:
        UserError: a tensor is missing or has the wrong shape.
    """
    ages = broadcast_from_rank0(lambda: _validated_ages(model, state))
    parameters = dict(model.named_parameters())
    optimizer.set_ages({parameters[name]: each for name, each in ages.items()})
    if broadcast_from_rank0(lambda: _has_moments(state)):
        _load_moments(model, optimizer, state)


def _has_moments(state: Mapping[str, Tensor]) -> bool:
    """Return whether a flat state has Adam's slots."""
    return any(key.startswith(f"{STEP}.") for key in state)


def _gather_moments(model: LanguageModel, optimizer: AgedAdamW) -> Iterator[tuple[str, Tensor]]:
    """Yield Adam's slots of each parameter that had an update, gathered to rank 0."""
    holders = first_holders(n for n, p in model.named_parameters() if p in optimizer.state)
    for name, parameter in model.named_parameters():
        if name in holders:
            here = optimizer.state.get(parameter, {})
            for slot in ADAM_SLOTS:
                like = _template(parameter, slot)
                yield f"{slot}.{name}", gather_to_rank0(here.get(slot), holders[name], like)


def _template(parameter: Tensor, slot: str) -> Tensor:
    """Return a tensor with the layout of a slot of a parameter."""
    if slot != STEP:
        return parameter
    return torch.zeros((), dtype=torch.float32, device=parameter.device)


def _validated_ages(model: LanguageModel, state: Mapping[str, Tensor]) -> dict[str, Ages]:
    """Return the ages in a state by parameter name, after a check that all of it fits the model."""
    ages: dict[str, Ages] = {}
    has_moments = _has_moments(state)
    remedy = "The state belongs to another model. Use the optimizer.safetensors of this model."
    for name, parameter in model.named_parameters():
        full = list(parameter.shape)
        shapes = dict.fromkeys(MOMENT_POWERS, full) | {ROW_AGE: full[:1], COLUMN_AGE: full[1:]}
        for slot, shape in shapes.items():
            found = state.get(f"{slot}.{name}")
            if found is not None and list(found.shape) != shape:
                raise UserError(
                    f"{slot}.{name} in the optimizer state must have shape {shape}, got "
                    f"{list(found.shape)}. {remedy}"
                )
        rows, columns = (state.get(f"{slot}.{name}") for slot in (ROW_AGE, COLUMN_AGE))
        needs_columns = rows is not None and parameter.dim() == 2
        required = (*(ADAM_SLOTS if has_moments else ()), *([COLUMN_AGE] if needs_columns else []))
        for slot in required:
            if f"{slot}.{name}" not in state:
                raise UserError(f"{slot}.{name} is missing in the optimizer state. {remedy}")
        if rows is not None:
            ages[name] = Ages(rows, columns)
    return ages


def _load_moments(model: LanguageModel, optimizer: AgedAdamW, state: Mapping[str, Tensor]) -> None:
    """Scatter Adam's slots from rank 0 and load them into the optimizer."""
    full = optimizer.state_dict()
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index = {parameter: number for number, parameter in enumerate(order)}
    full["state"] = {}
    for name, parameter in model.named_parameters():
        # Every rank takes part, also if another rank holds the state of the parameter.
        local = {
            slot: scatter_from_rank0(_template(parameter, slot), state.get(f"{slot}.{name}"))
            for slot in ADAM_SLOTS
        }
        if parameter in index:
            full["state"][index[parameter]] = local
    optimizer.load_state_dict(full)
