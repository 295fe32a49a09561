"""AdamW, its settings, its parameter groups, and its state as flat named tensors."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tokengrow.distributed.collectives import (
    broadcast_from_rank0,
    copy_to_host,
    first_holders,
    gather_to_rank0,
    scatter_from_rank0,
)
from tokengrow.errors import UserError
from tokengrow.growth.moments import COLUMN_AGE, ROW_AGE
from tokengrow.model.tokenformer import LanguageModel
from tokengrow.optim.adamw import AgedAdamW, Ages

SCHEDULES = ("cosine", "constant", "wsd", "neox_cosine")
ENTRIES = ("rewarm", "continue", "peak")
SLOTS = ("step", "exp_avg", "exp_avg_sq")
"""Adam's. The ages of a grown model's entries are two more."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and the learning rate of one stage."""

    lr: float = 6e-4
    """Peak learning rate."""
    min_lr: float = 6e-5
    """Learning rate at which a decay ends."""
    warmup_steps: float = 100
    """Updates over which the rate rises linearly to lr; the first update has lr / warmup_steps."""
    enter: str = "rewarm"
    """rewarm; peak: at lr, no warm-up; continue: likewise, lr being that of the stage before."""
    schedule: str = "cosine"
    """Then: cosine (down to min_lr), constant, wsd (linearly down at the end), or neox_cosine."""
    decay_share: float = 0.2
    """Share of the stage's updates, its last ones, over which wsd goes down to min_lr."""
    decay_steps: int | None = None
    """Updates after which a cosine has reached min_lr, warm-up included; null: all of the stage."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of Adam's first and second moment."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.1
    """Decoupled decay of everything but norms and biases."""
    grad_clip: float = 1.0
    """Largest norm of the gradient of a global batch."""

    def __post_init__(self) -> None:
        wsd = self.schedule == "wsd"
        # Key to whether its value is valid, and what is.
        checks = {
            "lr": (self.lr > 0, "it must be above 0"),
            "min_lr": (
                0 <= self.min_lr <= self.lr or self.schedule == "constant",
                f"it must lie between 0 and lr ({self.lr})",
            ),
            "warmup_steps": (self.warmup_steps >= 0, "it must be 0 or more"),
            "decay_steps": (
                self.decay_steps is None or (self.decay_steps > self.warmup and not wsd),
                "with schedule wsd give decay_share, and null here"
                if wsd
                else f"it must exceed warmup_steps ({self.warmup:g})",
            ),
            "decay_share": (
                0 < self.decay_share <= 1,
                "it must be above 0 and at most 1; schedule=constant does not decay",
            ),
            "betas": (
                len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
                "two numbers are needed, each from 0 to below 1",
            ),
            "eps": (self.eps > 0, "it must be above 0"),
            "weight_decay": (self.weight_decay >= 0, "it must be 0 or more"),
            "grad_clip": (self.grad_clip > 0, "it must be above 0; inf clips nothing"),
            "schedule": (self.schedule in SCHEDULES, f"valid are {', '.join(SCHEDULES)}"),
            "enter": (self.enter in ENTRIES, f"valid are {', '.join(ENTRIES)}"),
        }
        for key, (holds, reason) in checks.items():
            if not holds:
                raise UserError(f"optim.{key} cannot be {getattr(self, key)!r}: {reason}")

    @property
    def warmup(self) -> float:
        """Updates of the warm-up: none where the stage does not re-warm."""
        return self.warmup_steps if self.enter == "rewarm" else 0


def decays(parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices, not to norms and biases, as published."""
    return parameter.dim() > 1


def build_optimizer(model: LanguageModel, config: OptimConfig) -> AgedAdamW:
    """AdamW over two groups, decayed and not; fused where the parameters are on a GPU."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if decays(p)], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if not decays(p)], "weight_decay": 0.0},
    ]
    return AgedAdamW(
        groups,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=parameters[0].is_cuda or None,
    )


def optimizer_state(model: LanguageModel, optimizer: AgedAdamW) -> dict[str, Tensor]:
    """The optimizer's state as `{slot}.{parameter name}` to a CPU tensor, on rank 0.

    Adam's slots are there once there was an update, ages once there was a growth.

    Args:
        model: whose parameters they are, sharded or not.
        optimizer: over all of them, or over those of this rank.
    """
    state = copy_to_host(_moments(model, optimizer))
    ages = optimizer.ages()
    for name, parameter in model.named_parameters():
        if parameter in ages:
            each = ages[parameter]
            for slot, vector in ((ROW_AGE, each.rows), (COLUMN_AGE, each.columns)):
                if vector is not None:
                    state[f"{slot}.{name}"] = vector.float().cpu()
    return state


def _moments(model: LanguageModel, optimizer: AgedAdamW) -> Iterator[tuple[str, Tensor]]:
    """Adam's slots of each parameter that has had an update, gathered to rank 0."""
    holders = first_holders(n for n, p in model.named_parameters() if p in optimizer.state)
    for name, parameter in model.named_parameters():
        if name in holders:
            here = optimizer.state.get(parameter, {})
            for slot in SLOTS:
                like = _like(parameter, slot)
                yield f"{slot}.{name}", gather_to_rank0(here.get(slot), holders[name], like)


def _like(parameter: Tensor, slot: str) -> Tensor:
    """A tensor that is laid out as a slot of a parameter."""
    if slot != "step":
        return parameter
    return torch.zeros((), dtype=torch.float32, device=parameter.device)


def load_optimizer_state(
    model: LanguageModel, optimizer: AgedAdamW, state: Mapping[str, Tensor]
) -> None:
    """Puts back what `optimizer_state` gave.

    Args:
        model: whose parameters they are, sharded or not.
        optimizer: over all of them, or over those of this rank.
        state: on rank 0; elsewhere it is not looked at.

    Raises:
        UserError: a tensor that is missing or of another shape.
    """
    ages = broadcast_from_rank0(lambda: _checked_ages(model, state))
    parameters = dict(model.named_parameters())
    optimizer.set_ages({parameters[name]: each for name, each in ages.items()})
    if broadcast_from_rank0(lambda: any(key.startswith(f"{SLOTS[0]}.") for key in state)):
        _load_moments(model, optimizer, state)


def _checked_ages(model: LanguageModel, state: Mapping[str, Tensor]) -> dict[str, Ages]:
    """The ages in a state, by parameter name, if all of the state fits the model."""
    ages: dict[str, Ages] = {}
    has_moments = any(key.startswith(f"{SLOTS[0]}.") for key in state)
    for name, parameter in model.named_parameters():
        whole = list(parameter.shape)
        shapes = {"exp_avg": whole, "exp_avg_sq": whole, ROW_AGE: whole[:1], COLUMN_AGE: whole[1:]}
        for slot, shape in shapes.items():
            there = state.get(f"{slot}.{name}")
            if there is not None and list(there.shape) != shape:
                raise UserError(
                    f"the optimizer state's {slot}.{name} is {list(there.shape)}, where the "
                    f"parameter is {whole}: it is of another model"
                )
        for slot in SLOTS if has_moments else ():
            if f"{slot}.{name}" not in state:
                raise UserError(f"the optimizer state lacks {slot}.{name}: it is of another model")
        rows, columns = (state.get(f"{slot}.{name}") for slot in (ROW_AGE, COLUMN_AGE))
        if rows is not None:
            if columns is None and parameter.dim() == 2:
                raise UserError(f"the optimizer state lacks {COLUMN_AGE}.{name}")
            ages[name] = Ages(rows, columns)
    return ages


def _load_moments(model: LanguageModel, optimizer: AgedAdamW, state: Mapping[str, Tensor]) -> None:
    full = optimizer.state_dict()
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index = {parameter: number for number, parameter in enumerate(order)}
    full["state"] = {}
    for name, parameter in model.named_parameters():
        # On every rank, also for a parameter that another one keeps the state of.
        parts = {
            slot: scatter_from_rank0(_like(parameter, slot), state.get(f"{slot}.{name}"))
            for slot in SLOTS
        }
        if parameter in index:
            full["state"][index[parameter]] = parts
    optimizer.load_state_dict(full)
