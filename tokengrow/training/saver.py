"""Checkpoints written while training goes on."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from rich.console import Console

from tokengrow.checkpoint.layout import step_folder
from tokengrow.checkpoint.store import Checkpoint, prune_checkpoints, save_checkpoint
from tokengrow.training.room import room_for


class Saver:
    """Writes a run's checkpoints in a thread of its own, one after the other, and prunes old ones.

    Used as a context manager: what is being written when it is left is written to its end.

    Args:
        run: the run's folder.
        keep: how many of the newest checkpoints stay.
        console: where a line says that one could not be written.
    """

    def __init__(self, run: Path, keep: int, console: Console) -> None:
        self.run, self.keep, self.console = run, keep, console
        self._thread = ThreadPoolExecutor(1, "saver")
        self._writing: Future[None] | None = None

    def has(self, step: int) -> bool:
        """Whether the checkpoint of a step is written, once what is being written is.

        Raises:
            UserError: as `finish`.
        """
        self.finish()
        return (self.run / step_folder(step)).exists()

    def save(self, checkpoint: Checkpoint, stage_ends: set[int], needed: bool) -> None:
        """Begins to write a checkpoint; the one before must be finished.

        Args:
            checkpoint: in memory that nobody changes.
            stage_ends: steps whose checkpoints are never pruned.
            needed: `finish` raises where the disk has no room for it; else a line says so.
        """
        assert self._writing is None
        self._writing = self._thread.submit(self._write, checkpoint, stage_ends, needed)

    def finish(self) -> None:
        """Waits for what is being written.

        Raises:
            UserError: there is no room for it, and it is needed.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, checkpoint: Checkpoint, stage_ends: set[int], needed: bool) -> None:
        folder = self.run / step_folder(checkpoint.step)
        with room_for(checkpoint, folder, warn=None if needed else self.console):
            save_checkpoint(folder, checkpoint)
            prune_checkpoints(self.run, self.keep, stage_ends)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if kind is None:  # else that exception says what ended the run
            self.finish()
