"""LightningModule for next-token training.

`tokengrow.training.trainer` drives it through Fabric; it also runs under `lightning.Trainer`.
Shapes: `B` batch, `T` sequence, `V` vocabulary.
"""

import lightning
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from tokengrow.model.tokenformer import LanguageModel
from tokengrow.optim.config import OptimConfig, build_optimizer
from tokengrow.optim.schedule import learning_rate


class TokenFormerModule(lightning.LightningModule):
    """Next-token training of a TokenFormer, or of the Transformer baseline.

    Args:
        model: model to train.
        optim: optimizer settings and schedule.
        updates: number of optimizer updates that the schedule spans.
    """

    def __init__(self, model: LanguageModel, optim: OptimConfig, updates: int) -> None:
        super().__init__()
        self.model = model
        self.optim = optim
        self.updates = updates

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits [B, T, V] for token ids [B, T]."""
        return self.model(ids)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of token ids [B, T + 1], nats per token."""
        return self._step(batch, "train/loss")

    def validation_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of token ids [B, T + 1], nats per token."""
        return self._step(batch, "validation/loss")

    def _step(self, batch: Tensor, name: str) -> Tensor:
        loss: Tensor = self.model(batch[:, :-1], targets=batch[:, 1:])
        if self.fabric is None:  # under Fabric, the Trainer logs once per global batch
            self.log(name, loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return AdamW with its schedule, in the form that Lightning expects."""
        optimizer = build_optimizer(self.model, self.optim)
        schedule = LambdaLR(
            optimizer,
            lambda done: learning_rate(self.optim, done + 1, self.updates) / self.optim.lr,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
