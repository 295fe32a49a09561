"""When a stage has learnt what it will: the rule of Lightning's EarlyStopping, without a state."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tokengrow.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PlateauConfig:
    """How little a stage may gain before it ends."""

    patience: int = 3
    """Validations in a row without a new best after which the stage ends."""
    min_delta: float = 0.01
    """Nats per token by which a validation has to be below the best so far to be the new best."""

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise UserError(f"plateau.patience must be at least 1, not {self.patience}")
        if not 0 <= self.min_delta < math.inf:
            raise UserError(f"plateau.min_delta must be 0 or more, not {self.min_delta}")


def plateaued(losses: Sequence[float], config: PlateauConfig) -> bool:
    """Whether the losses have stopped falling.

    Args:
        losses: validation losses of one stage in their order, nats per token.
        config: patience and the least gain that counts.
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
