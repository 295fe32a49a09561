"""Errors of a device whose memory is too small for a stage."""

from collections.abc import Iterator
from contextlib import contextmanager

from tokengrow.compat import is_out_of_memory
from tokengrow.errors import UserError
from tokengrow.training.config import StageConfig, TrainConfig


@contextmanager
def explain_out_of_memory(config: TrainConfig, stage: StageConfig, device: str) -> Iterator[None]:
    """Turn an out-of-memory error inside the block into a `UserError`.

    Args:
        config: the run.
        stage: the stage that the block trains.
        device: name of the device.

    Raises:
        UserError: the model and one micro-batch do not fit into the memory of the device.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        one_sequence = config.micro_batch_size == 1
        remedy = "Choose a smaller model." if one_sequence else "Lower micro_batch_size."
        raise UserError(
            f"stage {stage.name} does not fit into the memory of {device} with "
            f"micro_batch_size={config.micro_batch_size}. {remedy}"
        ) from None
