"""AdamW with a separate age for each entry of a parameter.

After a growth, a tensor holds old entries with moments of many updates, and new ones with none. If
both had one step count, as in Adam, the first update of a new entry would be
(1 - b1) / sqrt(1 - b2) of the learning rate: 0.45 of it at (0.9, 0.95), 3.2 at (0.9, 0.999). Here
each entry has the bias correction of its own age. New entries have their own warm-up, and old ones
can be frozen, without splitting a tensor.

An entry is as old as the younger of its row and its column: see `tokengrow.growth.moments`.

Shapes: `N` rows, `D` columns of a parameter.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokengrow.distributed.collectives import local_rows, to_local
from tokengrow.growth.config import GrowthConfig

FLOAT32_ROUNDING = 2.0**-24
"""Rounding error of float32; a smaller bias correction has no effect."""

UpdateFactors = tuple[Tensor, Tensor, Tensor]
"""Factors of an update, each [N, D] or [N]: of the entries (weight decay), of the root of their
second moment, and of their first moment."""


@dataclass(frozen=True)
class Ages:
    """Number of updates of the rows and columns of a parameter."""

    rows: Tensor
    """[N] age of each row."""
    columns: Tensor | None = None
    """[D] age of each column; None for a one-dimensional parameter."""

    def to(self, device: torch.device) -> "Ages":
        """Return the ages on a device, in float64, because they are exponents of a beta near 1."""
        return self.map(lambda ages: ages.to(device, torch.float64))

    def add(self, updates: Tensor | float) -> "Ages":
        """Return the ages after more updates, given as a number or a scalar on their device."""
        return self.map(lambda ages: ages + updates)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Ages":
        """Apply a function to the age of each row and column."""
        return Ages(function(self.rows), None if self.columns is None else function(self.columns))

    def per_entry(self, function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
        """Apply a function to the age of each entry and return the results, [N, D] or [N]."""
        values = self.map(lambda ages: function(ages).to(dtype))
        if self.columns is None or values.columns is None:
            return values.rows
        is_row_younger = self.rows[:, None] <= self.columns
        return torch.where(is_row_younger, values.rows[:, None], values.columns)

    def youngest(self) -> float:
        """Return the age of the youngest entry."""
        return min(float(ages.min()) for ages in (self.rows, self.columns) if ages is not None)


class AgedAdamW(torch.optim.AdamW):
    """AdamW whose bias correction, learning rate and freeze depend on the age of each entry.

    Without ages, and for tensors with only old entries, it equals `torch.optim.AdamW`.

    Args:
        groups: parameter groups, as in `torch.optim.AdamW`.
        settings: keyword arguments of `torch.optim.AdamW`.
    """

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        super().__init__(groups, **settings)
        # Ages when they were set: of full parameters, of the rows of this rank, and their minimum.
        self._full_ages: dict[Tensor, Ages] = {}
        self._local_ages: dict[Tensor, Ages] = {}
        self._youngest: dict[Tensor, float] = {}
        # Updates since then, and how many of them the fused kernel skipped.
        self._updates = 0
        self._skipped: Tensor | float = 0.0
        # Settings of the stage, its updates before the ages were set, and the steps at its start.
        self._growth, self._updates_before = GrowthConfig(), 0
        self._start_steps: dict[Tensor, float] = {}
        self._age_groups: dict[Tensor, int] | None = None
        self._has_growth = False
        self._skip_flag: Tensor | None = None

    def set_ages(self, ages: dict[Tensor, Ages]) -> None:
        """Set per-entry ages; unlisted parameters count as old.

        Args:
            ages: ages of full parameters; this optimizer may have a shard of them, or none.
        """
        self._updates, self._skipped = 0, 0.0
        self._full_ages = {parameter: each.to(parameter.device) for parameter, each in ages.items()}
        self._local_ages = {
            parameter: Ages(local_rows(parameter, each.rows), each.columns)
            for parameter, each in self._full_ages.items()
        }
        self._youngest = {parameter: each.youngest() for parameter, each in ages.items()}
        self._age_groups = None

    def ages(self) -> dict[Tensor, Ages]:
        """Return the current ages of full parameters."""
        taken = self._updates - self._skipped
        return {parameter: each.add(taken) for parameter, each in self._full_ages.items()}

    def begin_stage(self, growth: GrowthConfig, updates_done: int) -> None:
        """Set the rules for entries that are not older than the stage.

        Args:
            growth: learning rate and warm-up of new entries, and freeze of old ones.
            updates_done: updates of the stage before this session.
        """
        self._growth, self._updates_before = growth, updates_done - self._updates
        self._start_steps = {parameter: self._step_of(parameter) for parameter in self._full_ages}
        self._has_growth = any(self._has_new(parameter) for parameter in self._full_ages)
        self._age_groups = None

    def _step_of(self, parameter: Tensor) -> float:
        """Return the number of updates of a parameter."""
        return float(self.state[parameter]["step"]) if parameter in self.state else 0.0

    def _group_by_age(self) -> dict[Tensor, int]:
        """Map each parameter to a number shared by those with the same ages and step count.

        The layers of a model have the same ages and step count. The update factors computed from
        them take about fifty small operations, on a GPU longer than the update itself.
        """
        numbers: dict[tuple[float, tuple[float, ...], tuple[float, ...] | None], int] = {}
        groups = {}
        for parameter, ages in self._local_ages.items():
            columns = None if ages.columns is None else tuple(ages.columns.tolist())
            key = (self._step_of(parameter), tuple(ages.rows.tolist()), columns)
            groups[parameter] = numbers.setdefault(key, len(numbers))
        return groups

    def zero_frozen_gradients(self) -> None:
        """Set the gradients of frozen entries to zero, so that clipping does not count them."""
        if self._frozen:
            for parameter, ages in self._local_ages.items():
                if parameter.grad is not None:
                    grad = to_local(parameter.grad)
                    grad.mul_(ages.per_entry(self._is_new, grad.dtype))

    def skip_if(self, flag: Tensor) -> None:
        """Skip the next update if a flag is 1; it then changes no weight, moment, step or age.

        Args:
            flag: float32 scalar on the device, 0 or 1.
        """
        self._skip_flag = flag

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters once; see `torch.optim.Optimizer.step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        mixed = [
            (parameter, parameter.grad, group)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and self._is_mixed(parameter, group)
        ]
        self.found_inf = self._flag_for_fused_kernel(mixed)  # the fused kernel reads it
        if self.found_inf is not None or self._skip_flag is None or not bool(self._skip_flag):
            for parameter, _, _ in mixed:
                parameter.grad = None
            super().step()
            if mixed and self._age_groups is None:
                self._age_groups = self._group_by_age()
            factors: dict[tuple[int, int], UpdateFactors] = {}
            for parameter, gradient, group in mixed:
                parameter.grad = gradient
                self._update(parameter, gradient, group, factors)
            self._updates += 1
        self._skip_flag = self.found_inf = None  # both apply only to this update
        return loss

    def _flag_for_fused_kernel(
        self, mixed: list[tuple[Tensor, Tensor, dict[str, Any]]]
    ) -> Tensor | None:
        """Return the flag of `skip_if` if only the fused kernel reads it, on the device; else None.

        The fused kernel does not update parameters with entries of several ages. They need the flag
        on the host, which waits for the device, as does an update on the CPU. Once there are no
        such parameters, there are none in later updates either. After that, `_updates` includes
        skipped updates, which only `ages` has to subtract.
        """
        if mixed or self._skip_flag is None or not self.param_groups[0]["fused"]:
            return None
        self._skipped = self._skipped + self._skip_flag
        return self._skip_flag

    @property
    def _stage_updates(self) -> int:
        """Number of updates of the stage so far."""
        return self._updates_before + self._updates

    @property
    def _frozen(self) -> bool:
        """Whether old entries are frozen in this update."""
        until = self._growth.freeze_source
        return self._has_growth and (until == -1 or self._stage_updates < until)

    def _is_new(self, ages: Tensor) -> Tensor:
        """Return whether entries that were set to these ages are not older than the stage."""
        return ages <= self._updates_before

    def _has_new(self, parameter: Tensor) -> bool:
        """Return whether some entries of a parameter are not older than the stage."""
        return self._youngest[parameter] <= self._updates_before

    def _is_mixed(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        """Return whether the entries of a parameter need different updates."""
        if parameter not in self._youngest:
            return False
        growth = self._growth
        if self._frozen:
            return True
        in_warmup = self._stage_updates + 1 < growth.new_warmup_steps
        if self._has_new(parameter) and (growth.new_lr_scale != 1 or in_warmup):
            return True
        beta1, beta2 = group["betas"]
        slowest = math.log(max(beta1, beta2, FLOAT32_ROUNDING))
        youngest = self._youngest[parameter]
        if frozen := self._frozen_updates(parameter):
            youngest = min(youngest, self._start_steps[parameter] - frozen)
        return (youngest + self._updates + 1) * slowest > math.log(FLOAT32_ROUNDING)

    def _frozen_updates(self, parameter: Tensor) -> int:
        """Return the number of updates of this stage that only new entries of a tensor had.

        A later stage has no record of them and counts frozen entries as that much older. This has
        an effect only if the source had few updates.
        """
        until = self._growth.freeze_source
        if not self._has_new(parameter):
            return 0
        return self._stage_updates if until == -1 else min(self._stage_updates, until)

    def _new_rate(self) -> float:
        """Return the learning rate of new entries in this update, divided by that of old ones."""
        growth = self._growth
        progress = (self._stage_updates + 1) / max(growth.new_warmup_steps, 1)
        return growth.new_lr_scale * min(progress, 1.0)

    def _update(
        self,
        parameter: Tensor,
        gradient: Tensor,
        group: dict[str, Any],
        factors: dict[tuple[int, int], UpdateFactors],
    ) -> None:
        """Update a parameter by AdamW with the step count and learning rate of each entry.

        Loshchilov and Hutter, arXiv 1711.05101, algorithm 2.

        Args:
            parameter: parameter to update.
            gradient: gradient of the parameter.
            group: group of the parameter, with its settings.
            factors: factors of this update, by age group and parameter group; missing ones are
                added.
        """
        ages = self._local_ages[parameter]
        state = self._state_of(parameter, group)
        tensors = (to_local(parameter), to_local(state["exp_avg"]), to_local(state["exp_avg_sq"]))
        if self._frozen and not self._has_new(parameter):
            return  # all entries are old
        state["step"] += 1
        oldest = state["step"] - self._frozen_updates(parameter)
        before = [tensor.clone() for tensor in tensors] if self._frozen else []
        assert self._age_groups is not None
        key = (self._age_groups[parameter], id(group))
        if key not in factors:
            factors[key] = self._update_factors(group, ages, oldest, parameter.dtype)
        _apply_update(tensors, to_local(gradient), group, factors[key])
        if self._frozen:
            new = ages.per_entry(self._is_new, torch.bool)
            for tensor, old in zip(tensors, before, strict=True):
                tensor.copy_(torch.where(new, tensor, old))

    def _update_factors(
        self, group: dict[str, Any], ages: Ages, step: Tensor, dtype: torch.dtype
    ) -> UpdateFactors:
        """Return the factors of this update.

        Args:
            group: parameter group with the settings.
            ages: ages of the entries when they were set.
            step: scalar; maximum number of updates in the moments of old entries.
            dtype: dtype of the factors.
        """
        lr: float = group["lr"]
        beta1, beta2 = group["betas"]

        def count(start: Tensor) -> Tensor:
            age = start + self._updates + 1
            return torch.where(self._is_new(start), age, torch.minimum(age, step.clamp_min(1)))

        def rate(start: Tensor) -> Tensor:
            scale = torch.where(self._is_new(start), self._new_rate(), 1.0)
            return lr * scale.to(start)

        def per_entry(function: Callable[[Tensor], Tensor]) -> Tensor:
            return ages.per_entry(function, dtype)

        return (
            per_entry(lambda start: 1 - rate(start) * group["weight_decay"]),
            per_entry(lambda start: (1 - beta2 ** count(start)) ** -0.5),
            per_entry(lambda start: rate(start) / (1 - beta1 ** count(start))),
        )

    def _state_of(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return the state of a parameter, initialised as in `torch.optim.AdamW`."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            device = parameter.device if group["fused"] else None
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for slot in ("exp_avg", "exp_avg_sq"):
                state[slot] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state


def _apply_update(
    tensors: tuple[Tensor, Tensor, Tensor],
    gradient: Tensor,
    group: dict[str, Any],
    factors: UpdateFactors,
) -> None:
    """Update a parameter and its two moments in place.

    Args:
        tensors: parameter, first and second moment.
        gradient: gradient, with the shape of the parameter.
        group: group of the parameter, with its settings.
        factors: factors of its entries.
    """
    parameter, exp_avg, exp_avg_sq = tensors
    beta1, beta2 = group["betas"]
    decay, root_scale, mean_scale = factors
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    parameter.mul_(decay)
    denominator = exp_avg_sq.sqrt().mul_(root_scale).add_(group["eps"])
    parameter.addcdiv_(exp_avg * mean_scale, denominator, value=-1)
