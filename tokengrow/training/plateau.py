"""Early end of a stage at a plateau of its validation loss: EarlyStopping without a state."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tokengrow.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PlateauConfig:
    """Rule that ends a stage when its validation loss stops falling."""

    patience: int = 3
    """Validations in a row without a new best loss after which the stage ends."""
    min_delta: float = 0.01
    """Minimum improvement on the best loss that counts, nats per token."""

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise UserError(f"plateau.patience must be at least 1, got {self.patience}.")
        if not 0 <= self.min_delta < math.inf:
            raise UserError(f"plateau.min_delta must be 0 or more, got {self.min_delta}.")


def reached_plateau(losses: Sequence[float], config: PlateauConfig) -> bool:
    """Return whether the losses have stopped falling.

    Args:
        losses: validation losses of one stage in order, nats per token.
        config: patience and minimum improvement.
    """
    best, waited = math.inf, 0
    for loss in losses:
        if loss < best - config.min_delta:
            best, waited = loss, 0
        else:
            waited += 1
        if waited == config.patience:
            return True
    return False
