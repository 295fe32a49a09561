"""Handling of non-finite losses and gradients.

An update whose gradient is not finite is skipped and counted on the device, without a
synchronisation with the host. Too many skipped updates in a row stop the run.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tokengrow.checkpoint.schema import TrainState
from tokengrow.data.sequences import Sequences
from tokengrow.errors import UserError
from tokengrow.files import write_atomically
from tokengrow.optim.schedule import learning_rate
from tokengrow.training.config import StageConfig, TrainConfig

NONFINITE_FILE = "nonfinite.json"
"""File in a run directory that describes the update that stopped the run."""


def poison_nonfinite_grad(loss: Tensor) -> Tensor:
    """Return the loss with a gradient of NaN if it is not finite; otherwise with the same bits.

    A logit that overflowed can give an infinite loss with a finite gradient. Each rank has its own
    loss, but the gradient norm is the same on all of them. Because the norm decides, all ranks skip
    the same updates without another collective.
    """
    return loss * torch.where(loss.isfinite(), 1.0, math.nan)


@dataclass(frozen=True)
class SkippedUpdates:
    """Counters of skipped updates, read from the device."""

    skipped: int
    """Updates skipped since the previous read."""
    in_a_row: int
    """Skipped updates at the end of those observed."""
    update: int
    """Last update of the stage with a non-finite gradient, from 1; 0: none yet."""
    norm: float
    """Norm of its gradient."""
    losses: list[float]
    """Losses of its micro-batches on this rank; their sum is the loss of the update."""


class GradientMonitor:
    """Counter of non-finite gradients that decides which updates to skip.

    A GPU runs ahead of the host, so all counters stay on the device until they are read. After more
    than `limit` non-finite updates in a row, every further update is skipped.

    Args:
        device: device of the gradients.
        limit: maximum number of skipped updates in a row.
        in_a_row: number of updates skipped directly before the first observed one.
    """

    def __init__(self, device: torch.device, limit: int, in_a_row: int = 0) -> None:
        self._limit = limit
        self._row = torch.tensor(min(in_a_row, limit), device=device)
        self._skipped = torch.zeros_like(self._row)
        self._last = torch.zeros(2, dtype=torch.float64, device=device)

    def observe(self, update: int, norm: Tensor, losses: Tensor) -> Tensor:
        """Record an update before the optimizer step.

        Args:
            update: number of the update in the stage, from 1.
            norm: scalar, norm of the gradient.
            losses: [micro-batches] losses of this rank.

        Returns:
            Scalar float32 on the device: 1 if the update must be skipped, otherwise 0.
        """
        over, bad = self._row > self._limit, ~norm.isfinite()
        # Filled on the device: converting a Python number to a tensor would synchronise.
        number = torch.full((1,), update, dtype=torch.float64, device=norm.device)
        current = torch.cat([number, norm.reshape(1).double(), losses.double()])
        if len(self._last) != len(current):
            self._last = torch.zeros_like(current)
        self._last = torch.where(bad & ~over, current, self._last)
        self._row = torch.where(over, self._row, (self._row + 1) * bad)
        self._skipped += bad | over
        return (bad | (self._row > self._limit)).float()

    def read(self) -> SkippedUpdates:
        """Return the counters since the previous read. Synchronises with the device."""
        counts = torch.stack([self._row, self._skipped]).double()
        row, skipped, update, norm, *losses = torch.cat([counts, self._last]).tolist()
        self._skipped.zero_()
        return SkippedUpdates(int(skipped), int(row), int(update), norm, losses)


def count_skipped_updates(
    monitor: GradientMonitor,
    state: TrainState,
    config: TrainConfig,
    sequences: Callable[[], Sequences],
    out: Path | None,
) -> str:
    """Add the updates skipped since the previous call to the state. Synchronises with the device.

    Args:
        monitor: monitor that observed them.
        state: state right after the last update.
        config: the run.
        sequences: opens the train split at the context length of the stage.
        out: directory for `NONFINITE_FILE`; None on a rank that writes no files.

    Returns:
        A line about them; empty if none was skipped.

    Raises:
        UserError: more than `max_skipped_steps` in a row; `NONFINITE_FILE` is written then.
    """
    found = monitor.read()
    state.rung.skipped += found.skipped
    state.skipped_in_a_row = found.in_a_row
    if not found.skipped:
        return ""
    stage, limit = config.stages[state.stage], config.max_skipped_steps
    loss, rate = sum(found.losses), learning_rate(stage.optim, found.update, stage.steps)
    batch = state.next_batch - 1 - (state.stage_step - found.update)
    line = (
        f"stage {stage.name}, step {found.update}: non-finite gradient (loss {loss:.4g}, "
        f"learning rate {rate:.3g}, global batch {batch})"
    )
    if found.in_a_row <= limit:
        others = f", and {found.skipped - 1} more since the last report"
        row = f"{found.in_a_row} in a row, at most {limit} allowed"
        return f"{line}; update skipped{others if found.skipped > 1 else ''} ({row})"
    if out is not None:
        record = {
            "stage": stage.name,
            "step": found.update,
            "global_batch": batch,
            "sequences": sequences().batch_indices(batch, config.batch_size, config.seed).tolist(),
            "loss": _json_number(loss),
            "grad_norm": _json_number(found.norm),
            "learning_rate": rate,
            "micro_batch_size": config.micro_batch_size,
            "micro_batch_losses": [_json_number(x * len(found.losses)) for x in found.losses],
            "skipped_in_a_row": found.in_a_row,
        }
        write_atomically(out / NONFINITE_FILE, json.dumps(record, indent=1).encode())
    raise UserError(
        f"{line}. {found.in_a_row} updates in a row were skipped, more than max_skipped_steps="
        f"{limit}. {NONFINITE_FILE} in the run directory lists the sequences of the last one. "
        f"{_remedy(stage)}"
    )


def check_validation_loss(loss: float, stage: StageConfig, state: TrainState) -> None:
    """Raise `UserError` if the validation loss is not finite."""
    if not math.isfinite(loss):
        raise UserError(
            f"stage {stage.name}, step {state.stage_step}: the validation loss is not finite, so "
            f"training cannot continue from these weights. {_remedy(stage)}"
        )


def _remedy(stage: StageConfig) -> str:
    return (
        "Start again from an earlier checkpoint (source=, another out=) with a lower "
        f"stages.{stage.name}.optim.lr or more warmup_steps."
    )


def _json_number(value: float) -> float | str:
    """Return a float, or a string for NaN and infinity, which JSON lacks."""
    return value if math.isfinite(value) else str(value)
