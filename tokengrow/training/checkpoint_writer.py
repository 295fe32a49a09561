"""Asynchronous checkpoint writing, with handling of a full disk."""

import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from tokengrow.checkpoint.layout import step_folder
from tokengrow.checkpoint.store import Checkpoint, delete_old_checkpoints, save_checkpoint
from tokengrow.errors import UserError
from tokengrow.files import NO_SPACE_ERRNOS
from tokengrow.training.resume import resume_hint

MEGABYTE = 1e6


class CheckpointWriter:
    """Writer of a run's checkpoints in a background thread, one at a time.

    After each write it deletes older checkpoints. As a context manager it completes the pending
    write on exit.

    Args:
        run: directory of the run.
        keep: number of newest checkpoints to keep.
        console: receives a warning if an optional checkpoint cannot be written.
    """

    def __init__(self, run: Path, keep: int, console: Console) -> None:
        self.run, self.keep, self.console = run, keep, console
        self._thread = ThreadPoolExecutor(1, "checkpoint_writer")
        self._pending: Future[None] | None = None

    def has(self, step: int) -> bool:
        """Return whether the checkpoint of `step` is complete, after waiting for a pending write.

        Raises:
            UserError: as `finish`.
        """
        self.finish()
        return (self.run / step_folder(step)).exists()

    def save(self, checkpoint: Checkpoint, stage_ends: set[int], required: bool) -> None:
        """Start to write a checkpoint. The previous write must be finished.

        Args:
            checkpoint: its tensors must not change until the write ends.
            stage_ends: steps whose checkpoints are never deleted.
            required: whether `finish` raises if the disk is full; otherwise a warning is printed.
        """
        assert self._pending is None
        self._pending = self._thread.submit(self._write, checkpoint, stage_ends, required)

    def finish(self) -> None:
        """Wait for the pending write.

        Raises:
            UserError: the disk is full and the checkpoint is required.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, checkpoint: Checkpoint, stage_ends: set[int], required: bool) -> None:
        folder = self.run / step_folder(checkpoint.step)
        with handle_full_disk(checkpoint, folder, warn=None if required else self.console):
            save_checkpoint(folder, checkpoint)
            delete_old_checkpoints(self.run, self.keep, stage_ends)

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if kind is None:  # otherwise the active exception takes precedence
            self.finish()


@contextmanager
def handle_full_disk(
    checkpoint: Checkpoint, folder: Path, warn: Console | None = None
) -> Iterator[None]:
    """Turn a full disk inside the block, which writes `checkpoint`, into a warning or an error.

    Args:
        checkpoint: the checkpoint to write.
        folder: its directory.
        warn: receives one line, and the exception is suppressed; None: raise.

    Raises:
        UserError: the disk is full and `warn` is None.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE_ERRNOS:
            raise
        tensors = [*checkpoint.weights.values(), *checkpoint.optimizer.values()]
        needed = sum(tensor.nbytes for tensor in tensors) / MEGABYTE
        free = shutil.disk_usage(folder.parent).free / MEGABYTE
        problem = (
            f"cannot write {folder} ({error.strerror}; needs {needed:,.1f} MB, {free:,.1f} MB free)"
        )
        hint = resume_hint(folder.parent)
        if warn is None:
            raise UserError(f"{problem}. Free disk space; then {hint}") from None
        text = f"{problem}. Training continues without this checkpoint; if the run ends now, {hint}"
        warn.print(text, highlight=False, soft_wrap=True)
