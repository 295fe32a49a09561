"""Losses and gradients that are not finite: such an update is not taken but counted, on the device,
which nobody waits for; too many in a row stop the run."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tokengrow.data.sequences import Sequences
from tokengrow.errors import UserError
from tokengrow.files import write_atomically
from tokengrow.optim.schedule import learning_rate
from tokengrow.training.config import StageConfig, TrainConfig
from tokengrow.training.state import TrainState

RECORD = "nonfinite.json"
"""File in a run's folder on the update that stopped it."""


def poison_nonfinite_grad(loss: Tensor) -> Tensor:
    """The loss, with a gradient of NaN where it is not finite; else the same bits.

    A logit that overflowed can give an infinite loss and a finite gradient. The loss is a rank's
    own, but the norm of the gradient is the same on all of them: decided by the norm, all skip the
    same updates, and no further collective is needed.
    """
    return loss * torch.where(loss.isfinite(), 1.0, math.nan)


@dataclass(frozen=True)
class Seen:
    """What the device has counted."""

    skipped: int
    """Updates not taken since the last look."""
    in_a_row: int
    """Updates not taken at the end of those seen."""
    update: int
    """Of the stage, from 1: the last one whose gradient was not finite; 0: none yet."""
    norm: float
    """Of its gradient."""
    losses: list[float]
    """Of its micro-batches on this rank; they add up to its loss."""


class GradientWatch:
    """Says of each update whether it may be taken, and remembers the last that may not.

    A GPU runs ahead, so all of it stays on the device until somebody looks. Once more than `limit`
    updates in a row were not finite, none is taken any more.

    Args:
        device: of the gradients.
        limit: updates in a row that may be skipped.
        in_a_row: how many were skipped just before the first that it will see.
    """

    def __init__(self, device: torch.device, limit: int, in_a_row: int = 0) -> None:
        self._limit = limit
        self._row = torch.tensor(min(in_a_row, limit), device=device)
        self._skipped = torch.zeros_like(self._row)
        self._last = torch.zeros(2, dtype=torch.float64, device=device)

    def see(self, update: int, norm: Tensor, losses: Tensor) -> Tensor:
        """Notes an update before it is taken.

        Args:
            update: its number in the stage, from 1.
            norm: scalar, of its gradient.
            losses: [micro-batches] of this rank.

        Returns:
            Scalar float32 on the device: 1 if this update must not be taken, else 0.
        """
        over, bad = self._row > self._limit, ~norm.isfinite()
        # Filled on the device: a Python number made into a tensor would be waited for.
        number = torch.full((1,), update, dtype=torch.float64, device=norm.device)
        this = torch.cat([number, norm.reshape(1).double(), losses.double()])
        if len(self._last) != len(this):
            self._last = torch.zeros_like(this)
        self._last = torch.where(bad & ~over, this, self._last)
        self._row = torch.where(over, self._row, (self._row + 1) * bad)
        self._skipped += bad | over
        return (bad | (self._row > self._limit)).float()

    def look(self) -> Seen:
        """What was counted since the last look. Waits for the device."""
        counts = torch.stack([self._row, self._skipped]).double()
        row, skipped, update, norm, *losses = torch.cat([counts, self._last]).tolist()
        self._skipped.zero_()
        return Seen(int(skipped), int(row), int(update), norm, losses)


def count_skipped(
    watch: GradientWatch,
    state: TrainState,
    config: TrainConfig,
    sequences: Callable[[], Sequences],
    out: Path | None,
) -> str:
    """Counts in the state which updates were not taken since the last look. Waits for the device.

    Args:
        watch: that saw them.
        state: right after the last update.
        config: the run.
        sequences: opens the train split, at the stage's context length.
        out: folder for `RECORD`; None on a rank that writes nothing.

    Returns:
        A line about them; empty if all were taken.

    Raises:
        UserError: more in a row than `max_skipped_steps`; `RECORD` is written then.
    """
    seen = watch.look()
    state.rung.skipped += seen.skipped
    state.skipped_in_a_row = seen.in_a_row
    if not seen.skipped:
        return ""
    stage, limit = config.stages[state.stage], config.max_skipped_steps
    loss, rate = sum(seen.losses), learning_rate(stage.optim, seen.update, stage.steps)
    batch = state.next_batch - 1 - (state.stage_step - seen.update)
    line = (
        f"stage {stage.name}, step {seen.update}: the gradient is not finite (loss {loss:.4g}, "
        f"learning rate {rate:.3g}, global batch {batch}): "
    )
    if seen.in_a_row <= limit:
        more = f", nor were {seen.skipped - 1} others since the last look"
        row = f"{seen.in_a_row} in a row of at most {limit}"
        return f"{line}this update was not taken{more if seen.skipped > 1 else ''} ({row})"
    if out is not None:
        record = {
            "stage": stage.name,
            "step": seen.update,
            "global_batch": batch,
            "sequences": sequences().batch(batch, config.batch_size, config.seed).tolist(),
            "loss": _number(loss),
            "grad_norm": _number(seen.norm),
            "learning_rate": rate,
            "micro_batch_size": config.micro_batch_size,
            "micro_batch_losses": [_number(part * len(seen.losses)) for part in seen.losses],
            "skipped_in_a_row": seen.in_a_row,
        }
        write_atomically(out / RECORD, json.dumps(record, indent=1).encode())
    raise UserError(
        f"{line}{seen.in_a_row} updates in a row were not taken, more than max_skipped_steps="
        f"{limit}; {RECORD} in the run's folder says which sequences the last one had. "
        f"{_way_out(stage)}"
    )


def check_validation(loss: float, stage: StageConfig, state: TrainState) -> None:
    """Refuses to go on with weights that give a validation loss that is not finite."""
    if not math.isfinite(loss):
        raise UserError(
            f"stage {stage.name}, step {state.stage_step}: the validation loss is not finite, so "
            f"the weights are not fit to go on with. {_way_out(stage)}"
        )


def _way_out(stage: StageConfig) -> str:
    return (
        "Start again from a checkpoint before it (source=, another out=), with a lower "
        f"stages.{stage.name}.optim.lr or more warmup_steps"
    )


def _number(value: float) -> float | str:
    """As JSON has it, which knows no NaN."""
    return value if math.isfinite(value) else str(value)
