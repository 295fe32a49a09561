"""Batches of one rank from the splits of the tokens, and the mean validation loss over them.

Shapes: `b` micro-batch, `T` sequence.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from lightning.fabric import Fabric
from torch import Tensor

from tokengrow.data.loader import train_loader, validation_loader
from tokengrow.data.sequences import Sequences
from tokengrow.training.config import TrainConfig


def train_batches(
    config: TrainConfig, fabric: Fabric, sequences: Sequences, start_batch: int
) -> Iterator[Tensor]:
    """Return an endless iterator over the micro-batches [b, T + 1] of this rank, on its device.

    Args:
        config: seed and batch sizes.
        fabric: devices of the run.
        sequences: train split at the context length of the stage.
        start_batch: index of the first global batch.
    """
    loader = train_loader(
        sequences,
        seed=config.seed,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        start_batch=start_batch,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
    )
    return iter(cast(Any, fabric.setup_dataloaders(loader, use_distributed_sampler=False)))


@torch.no_grad()
def mean_validation_loss(
    config: TrainConfig, fabric: Fabric, sequences: Sequences, module: Any
) -> float:
    """Return the mean loss over `validation_sequences` on all ranks, nats per token.

    Args:
        config: batch size and number of sequences.
        fabric: devices of the run.
        sequences: validation split at the context length of the stage.
        module: TokenFormerModule in Fabric's wrapper.
    """
    loader = validation_loader(
        sequences,
        batch_size=config.micro_batch_size,
        max_sequences=config.validation_sequences,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
    )
    total = torch.zeros(2, dtype=torch.float64, device=fabric.device)  # summed loss, sequences
    for index, batch in enumerate(fabric.setup_dataloaders(loader, use_distributed_sampler=False)):
        with fabric.autocast():
            loss = module.validation_step(batch, index)
        total += total.new_tensor([loss.item() * len(batch), len(batch)])
    summed, count = cast(Tensor, fabric.all_reduce(total, reduce_op="sum")).tolist()
    return summed / count
