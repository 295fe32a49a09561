"""Checkpoints written while training goes on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from tokengrow.checkpoint.layout import step_folder
from tokengrow.checkpoint.store import Checkpoint, prune_checkpoints, save_checkpoint


class Saver:
    """Writes a run's checkpoints in a thread of its own, one after the other, and prunes old ones.

    Used as a context manager: what is being written when it is left is written to its end.

    Args:
        run: the run's folder.
        keep: how many of the newest checkpoints stay.
        warn: told in one sentence of a checkpoint that could not be written.
    """

    def __init__(self, run: Path, keep: int, warn: Callable[[str], None]) -> None:
        self.run, self.keep, self.warn = run, keep, warn
        self._thread = ThreadPoolExecutor(1, "saver")
        self._writing: Future[None] | None = None

    def save(self, checkpoint: Checkpoint, stage_ends: set[int]) -> None:
        """Begins to write a checkpoint, once the one before is written.

        If that one failed for lack of room, say, the run goes on with what older ones it has.

        Args:
            checkpoint: in memory that nobody changes.
            stage_ends: steps whose checkpoints are never pruned.
        """
        try:
            self.finish()
        except OSError as error:
            self._warn_of(error)
        self._writing = self._thread.submit(self._write, checkpoint, stage_ends)

    def finish(self) -> None:
        """Waits for what is being written.

        Raises:
            OSError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, checkpoint: Checkpoint, stage_ends: set[int]) -> None:
        save_checkpoint(self.run / step_folder(checkpoint.step), checkpoint)
        prune_checkpoints(self.run, self.keep, stage_ends)

    def _warn_of(self, error: OSError) -> None:
        self.warn(
            f"a checkpoint could not be written to {self.run} ({error.strerror or error}): "
            "training goes on, and older checkpoints are whole"
        )

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.finish()
        except OSError as failed:
            if kind is None:
                raise
            self._warn_of(failed)  # what ends the run is said by its own exception
        finally:
            self._thread.shutdown()
