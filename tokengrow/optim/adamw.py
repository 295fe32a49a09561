"""AdamW that knows how old each entry of a parameter is.

After a growth a tensor holds old entries, with moments of many updates, and new ones, with none.
One step count for both, as Adam has it, would make the first update of a new entry
(1 - b1) / sqrt(1 - b2) of the learning rate: 0.45 of it at (0.9, 0.95), 3.2 at (0.9, 0.999). Here
each entry has the bias correction of its own age, new ones have a warm-up of their own, and old
ones can be frozen, while the tensors stay whole.

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

Factors = tuple[Tensor, Tensor, Tensor]
"""What an update multiplies the entries of a parameter, [N, D] or [N], by: them, the root of their
second moment, and their first moment."""


@dataclass(frozen=True)
class Ages:
    """Updates that the rows and columns of a parameter have had; of a vector, its rows alone."""

    rows: Tensor
    """[N]."""
    columns: Tensor | None = None
    """[D]."""

    def on(self, device: torch.device) -> "Ages":
        """The ages there, in float64: powers of a beta near 1 are taken of them."""
        return self.map(lambda ages: ages.to(device, torch.float64))

    def plus(self, updates: Tensor | float) -> "Ages":
        """The ages so many updates later; a number or a scalar on their device."""
        return self.map(lambda ages: ages + updates)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Ages":
        """A function of the age of each row and column."""
        return Ages(function(self.rows), None if self.columns is None else function(self.columns))

    def per_entry(self, function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
        """A function of the age of each entry, [N, D] (or [N])."""
        of = self.map(lambda ages: function(ages).to(dtype))
        if self.columns is None or of.columns is None:
            return of.rows
        return torch.where(self.rows[:, None] <= self.columns, of.rows[:, None], of.columns)

    def youngest(self) -> float:
        """Age of the youngest entry."""
        return min(float(ages.min()) for ages in (self.rows, self.columns) if ages is not None)


class AgedAdamW(torch.optim.AdamW):
    """AdamW with bias corrections, learning rates and a freeze by the age of each entry.

    Without ages, and for tensors whose entries are all old, it is `torch.optim.AdamW`.
    """

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        super().__init__(groups, **settings)
        self._loaded: dict[Tensor, Ages] = {}
        self._here: dict[Tensor, Ages] = {}
        self._youngest: dict[Tensor, float] = {}
        self._updates = 0
        self._unknown: Tensor | float = 0.0
        self._growth, self._done = GrowthConfig(), 0
        self._steps: dict[Tensor, float] = {}
        self._kinds: dict[Tensor, int] | None = None
        self._grown = False
        self._skip: Tensor | None = None

    def set_ages(self, ages: dict[Tensor, Ages]) -> None:
        """Says how old the entries of parameters are; of one that is not named, all are old.

        Args:
            ages: of whole parameters, of which this optimizer may have a part, or none.
        """
        self._updates, self._unknown = 0, 0.0
        self._loaded = {parameter: each.on(parameter.device) for parameter, each in ages.items()}
        self._here = {
            parameter: Ages(local_rows(parameter, each.rows), each.columns)
            for parameter, each in self._loaded.items()
        }
        self._youngest = {parameter: each.youngest() for parameter, each in ages.items()}
        self._kinds = None

    def ages(self) -> dict[Tensor, Ages]:
        """How old the entries of parameters are now."""
        taken = self._updates - self._unknown
        return {parameter: each.plus(taken) for parameter, each in self._loaded.items()}

    def begin_stage(self, growth: GrowthConfig, done: int) -> None:
        """Says what becomes of entries that are not older than the stage.

        Args:
            growth: the learning rate and warm-up of new entries, and the freeze of old ones.
            done: updates of the stage before this session.
        """
        self._growth, self._done = growth, done - self._updates
        self._steps = {parameter: self._step_of(parameter) for parameter in self._loaded}
        self._grown = any(self._has_new(parameter) for parameter in self._loaded)
        self._kinds = None

    def _step_of(self, parameter: Tensor) -> float:
        """Updates that a parameter has had."""
        return float(self.state[parameter]["step"]) if parameter in self.state else 0.0

    def _numbered_kinds(self) -> dict[Tensor, int]:
        """Parameter to a number that it shares with those of the same ages and step count.

        The layers of a model are alike in both, and what follows from them is some fifty small
        operations, which on a GPU would take longer than the update itself.
        """
        numbers: dict[Any, int] = {}
        kinds = {}
        for parameter, ages in self._here.items():
            columns = None if ages.columns is None else tuple(ages.columns.tolist())
            kind = (self._step_of(parameter), tuple(ages.rows.tolist()), columns)
            kinds[parameter] = numbers.setdefault(kind, len(numbers))
        return kinds

    def drop_frozen_gradients(self) -> None:
        """Sets gradients of frozen entries to zero: clipping must not count what does not move."""
        if self._frozen:
            for parameter, ages in self._here.items():
                if parameter.grad is not None:
                    grad = to_local(parameter.grad)
                    grad.mul_(ages.per_entry(self._is_new, grad.dtype))

    def skip_if(self, flag: Tensor) -> None:
        """The next update is not taken if this scalar on the device is 1; float32, 0 or 1.

        An update that is not taken changes nothing: no weight, moment, step count or age.
        """
        self._skip = flag

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; see `torch.optim.Optimizer.step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        aside = [
            (parameter, parameter.grad, group)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and self._is_mixed(parameter, group)
        ]
        self.found_inf = self._left_to_the_kernel(aside)  # what the fused kernel reads
        if self.found_inf is not None or self._skip is None or not bool(self._skip):
            for parameter, _, _ in aside:
                parameter.grad = None
            super().step()
            if aside and self._kinds is None:
                self._kinds = self._numbered_kinds()
            factors: dict[tuple[int, int], Factors] = {}
            for parameter, gradient, group in aside:
                parameter.grad = gradient
                self._update(parameter, gradient, group, factors)
            self._updates += 1
        self._skip = self.found_inf = None  # they were of this update alone
        return loss

    def _left_to_the_kernel(self, aside: list[Any]) -> Tensor | None:
        """The flag of `skip_if`, if the fused kernel is to act on it unseen by us; else None.

        Entries of several ages are not updated by that kernel, so for them the device is waited
        for, as for a CPU. Once none are left aside there never are again, so what `_updates` then
        counts too much of is missed nowhere but in `ages`.
        """
        if aside or self._skip is None or not self.param_groups[0]["fused"]:
            return None
        self._unknown = self._unknown + self._skip
        return self._skip

    @property
    def _stage_updates(self) -> int:
        """Updates of the stage so far."""
        return self._done + self._updates

    @property
    def _frozen(self) -> bool:
        until = self._growth.freeze_source
        return self._grown and (until == -1 or self._stage_updates < until)

    def _is_new(self, ages: Tensor) -> Tensor:
        """Whether what had these ages when they were loaded is not older than the stage."""
        return ages <= self._done

    def _has_new(self, parameter: Tensor) -> bool:
        """Whether some of a parameter is not older than the stage."""
        return self._youngest[parameter] <= self._done

    def _is_mixed(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        """Whether entries of a parameter need updates of different kinds."""
        if parameter not in self._youngest:
            return False
        growth = self._growth
        if self._frozen:
            return True
        of_its_own = growth.new_lr_scale != 1 or self._stage_updates + 1 < growth.new_warmup_steps
        if self._has_new(parameter) and of_its_own:
            return True
        beta1, beta2 = group["betas"]
        slowest = math.log(max(beta1, beta2, FLOAT32_ROUNDING))
        least = self._youngest[parameter]
        if held := self._held(parameter):
            least = min(least, self._steps[parameter] - held)
        return (least + self._updates + 1) * slowest > math.log(FLOAT32_ROUNDING)

    def _held(self, parameter: Tensor) -> int:
        """Updates of this stage that the tensor had, but its old entries had not.

        A later stage does not know of them, and takes what was frozen for that much older. That
        matters to sources with moments of few updates alone.
        """
        until = self._growth.freeze_source
        if not self._has_new(parameter):
            return 0
        return self._stage_updates if until == -1 else min(self._stage_updates, until)

    def _new_rate(self) -> float:
        """Learning rate of new entries in this update, over that of old ones."""
        growth = self._growth
        warmed = (self._stage_updates + 1) / max(growth.new_warmup_steps, 1)
        return growth.new_lr_scale * min(warmed, 1.0)

    def _update(
        self,
        parameter: Tensor,
        gradient: Tensor,
        group: dict[str, Any],
        factors: dict[tuple[int, int], Factors],
    ) -> None:
        """AdamW as in Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, with each entry's
        count and rate.

        Args:
            parameter: that is updated.
            gradient: of it.
            group: of the parameter, with its settings.
            factors: of this update, by kind of parameter and group; added to.
        """
        ages = self._here[parameter]
        state = self._state_of(parameter, group)
        tensors = (to_local(parameter), to_local(state["exp_avg"]), to_local(state["exp_avg_sq"]))
        if self._frozen and not self._has_new(parameter):
            return  # none of it is new
        state["step"] += 1
        oldest = state["step"] - self._held(parameter)
        before = [tensor.clone() for tensor in tensors] if self._frozen else []
        assert self._kinds is not None
        kind = (self._kinds[parameter], id(group))
        if kind not in factors:
            factors[kind] = self._factors(group, ages, oldest, parameter.dtype)
        _move(tensors, to_local(gradient), group, factors[kind])
        if self._frozen:
            new = ages.per_entry(self._is_new, torch.bool)
            for tensor, old in zip(tensors, before, strict=True):
                tensor.copy_(torch.where(new, tensor, old))

    def _factors(
        self, group: dict[str, Any], ages: Ages, step: Tensor, dtype: torch.dtype
    ) -> Factors:
        """What this update multiplies entries by.

        Args:
            group: the settings.
            ages: of the entries, when they were loaded.
            step: scalar; the updates that the moments of old entries hold at most.
            dtype: of the factors.
        """
        beta1, beta2 = group["betas"]

        def count(loaded: Tensor) -> Tensor:
            age = loaded + self._updates + 1
            return torch.where(self._is_new(loaded), age, torch.minimum(age, step.clamp_min(1)))

        def rate(loaded: Tensor) -> Tensor:
            own = torch.where(self._is_new(loaded), self._new_rate(), 1.0)
            return group["lr"] * own.to(loaded)

        def each(function: Callable[[Tensor], Tensor]) -> Tensor:
            return ages.per_entry(function, dtype)

        return (
            each(lambda loaded: 1 - rate(loaded) * group["weight_decay"]),
            each(lambda loaded: (1 - beta2 ** count(loaded)) ** -0.5),
            each(lambda loaded: rate(loaded) / (1 - beta1 ** count(loaded))),
        )

    def _state_of(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The parameter's state, as `torch.optim.AdamW` begins it."""
        state = self.state[parameter]
        if not state:
            device = parameter.device if group["fused"] else None
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for slot in ("exp_avg", "exp_avg_sq"):
                state[slot] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state


def _move(
    tensors: tuple[Tensor, Tensor, Tensor],
    gradient: Tensor,
    group: dict[str, Any],
    factors: Factors,
) -> None:
    """Moves a parameter and its two moments, in place.

    Args:
        tensors: these three.
        gradient: shaped like each of them.
        group: of the parameter, with its settings.
        factors: of its entries.
    """
    parameter, mean, square = tensors
    beta1, beta2 = group["betas"]
    kept, spread_by, move_by = factors
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    parameter.mul_(kept)
    spread = square.sqrt().mul_(spread_by).add_(group["eps"])
    parameter.addcdiv_(mean * move_by, spread, value=-1)
