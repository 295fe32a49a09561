"""The checkpoint that a verb's `source` names."""

from tokengrow.checkpoint.store import Checkpoint, load_checkpoint
from tokengrow.errors import UserError


def load_source(source: str, tensors: bool = True, streamed: bool = False) -> Checkpoint:
    """Reads it.

    Args:
        source: the key's value.
        tensors: as for `load_checkpoint`.
        streamed: likewise.

    Raises:
        UserError: nothing there, or nothing whole; the sentence names the key.
    """
    try:
        return load_checkpoint(source, tensors, streamed)
    except UserError as error:
        raise UserError(f"source: {error}") from None
