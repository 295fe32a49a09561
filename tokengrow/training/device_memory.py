"""Errors of a device whose memory is too small for a stage."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tokengrow.errors import UserError
from tokengrow.training.config import StageConfig, TrainConfig


@contextmanager
def fits(run: TrainConfig, stage: StageConfig, device: str) -> Iterator[None]:
    """What runs inside needs the memory of a stage.

    Raises:
        UserError: the model and a micro-batch are more than the device holds.
    """
    try:
        yield
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        way_out = "lower micro_batch_size" if run.micro_batch_size > 1 else "take a smaller model"
        raise UserError(
            f"stage {stage.name} does not fit into the memory of {device} with "
            f"micro_batch_size={run.micro_batch_size}: {way_out}"
        ) from None


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that the device's memory is too small."""
    # On a CPU it has no class of its own.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
