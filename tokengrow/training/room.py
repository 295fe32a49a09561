"""A disk that has no room for a checkpoint."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from tokengrow.checkpoint.store import Checkpoint
from tokengrow.errors import UserError
from tokengrow.files import NO_ROOM
from tokengrow.training.resume import what_resumes

MEGABYTE = 1e6


@contextmanager
def room_for(checkpoint: Checkpoint, folder: Path, warn: Console | None = None) -> Iterator[None]:
    """The block writes a checkpoint, whole or not at all; what if there is no room for it.

    Args:
        checkpoint: that is written.
        folder: its own.
        warn: where one line says so, and the run goes on; None: it cannot go on without.

    Raises:
        UserError: there is no room, and nobody to warn.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        tensors = [*checkpoint.weights.values(), *checkpoint.optimizer.values()]
        needed = sum(tensor.nbytes for tensor in tensors) / MEGABYTE
        free = shutil.disk_usage(folder.parent).free / MEGABYTE
        what = (
            f"{folder} cannot be written ({error.strerror}; it takes {needed:,.1f} MB, "
            f"{free:,.1f} MB are free)"
        )
        resumes = what_resumes(folder.parent)
        if warn is None:
            raise UserError(f"{what}: make room on the disk; then {resumes}") from None
        text = f"{what}: training goes on without it; should it end before the next one, {resumes}"
        warn.print(text, highlight=False, soft_wrap=True)
