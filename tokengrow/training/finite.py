"""Whether gradients are finite, found out without waiting for the device at every update."""

import torch
from torch import Tensor

from tokengrow.errors import UserError
from tokengrow.training.ladder import StageConfig


class GradientWatch:
    """Remembers, on the device, the first update whose gradient was not finite.

    From that update on the optimizer takes none, and `check` says so as soon as somebody looks:
    between the two a GPU may run ahead by a few updates that change nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._first = torch.zeros(3, device=device)  # update, loss and rate; float32

    def see(self, update: int, norm: Tensor, loss: Tensor, rate: float) -> Tensor:
        """Notes an update before it is taken.

        Args:
            update: its number in the stage, from 1.
            norm: scalar, of its gradient.
            loss: scalar.
            rate: the learning rate.

        Returns:
            Scalar float32 on the device: 1 if this update must not be taken, else 0.
        """
        # Filled on the device: Python numbers made into a tensor would be waited for.
        this = torch.empty_like(self._first)
        this[0].fill_(update)
        this[1].copy_(loss)
        this[2].fill_(rate)
        unseen = self._first[0] == 0
        self._first = torch.where(unseen & ~norm.isfinite(), this, self._first)
        return (self._first[0] > 0).float()

    def check(self, stage: StageConfig) -> None:
        """Waits for the device.

        Raises:
            UserError: an update was not taken.
        """
        update, loss, rate = self._first.tolist()
        if update:
            raise UserError(
                f"stage {stage.name}, step {update:.0f}: the gradient is not finite (loss "
                f"{loss:.4g}, learning rate {rate:.3g}): lower stages.{stage.name}.optim.lr or "
                "raise its warmup_steps; this step was not taken, and checkpoints before it are "
                "whole"
            )
