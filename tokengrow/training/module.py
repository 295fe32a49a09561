"""The LightningModule: what one batch means, and what trains on it.

`tokengrow.training.fit` drives it through Fabric; it runs under `lightning.Trainer` as well.
Shapes: `B` batch, `T` sequence.
"""

from typing import Any

import lightning
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from tokengrow.model.tokenformer import LanguageModel
from tokengrow.optim.config import OptimConfig, build_optimizer
from tokengrow.optim.schedule import learning_rate


class TokenFormerModule(lightning.LightningModule):
    """Next-token training of a TokenFormer, or of the Transformer beside it.

    Args:
        model: what is trained.
        optim: AdamW and the schedule.
        updates: how many optimizer updates the schedule spans.
    """

    def __init__(self, model: LanguageModel, optim: OptimConfig, updates: int) -> None:
        super().__init__()
        self.model = model
        self.optim = optim
        self.updates = updates

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] token ids to [B, T, V] logits."""
        return self.model(ids)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean cross-entropy of [B, T + 1] token ids, nats per token."""
        return self._step(batch, "train/loss")

    def validation_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean cross-entropy of [B, T + 1] token ids, nats per token."""
        return self._step(batch, "validation/loss")

    def _step(self, batch: Tensor, name: str) -> Tensor:
        loss = self.model(batch[:, :-1], targets=batch[:, 1:])
        if self.fabric is None:  # under Fabric the loop logs, once per global batch
            self.log(name, loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW, and the schedule in Lightning's form."""
        optimizer = build_optimizer(self.model, self.optim)
        schedule = LambdaLR(
            optimizer,
            lambda done: learning_rate(self.optim, done + 1, self.updates) / self.optim.lr,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
