"""What is evaluated: a checkpoint, and the tokenizer on whose tokens it was trained."""

from tokengrow.checkpoint.store import Checkpoint
from tokengrow.data.tokenizer import Tokenizer
from tokengrow.errors import UserError


def checkpoint_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer on whose tokens a checkpoint was trained.

    Raises:
        UserError: a checkpoint that was saved without one.
    """
    if checkpoint.tokenizer is None or checkpoint.end_of_text is None:
        raise UserError(
            f"{checkpoint.folder} holds no tokenizer, as a bare model does: give it one with "
            f"`tokengrow convert source={checkpoint.folder} tokenizer.file=FILE to=tokengrow "
            "out=DIR`"
        )
    return Tokenizer.from_json(checkpoint.tokenizer, checkpoint.end_of_text)
