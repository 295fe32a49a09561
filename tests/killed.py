"""Runs that are killed, and whether they end as one that was not."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tokengrow.checkpoint.store import Checkpoint
from tokengrow.training import checkpoint_writer
from tokengrow.training.trainer import FitResult

SAME_BITS = ("model.safetensors", "optimizer.safetensors", "train_state.json", "lineage.json")
"""Files of a checkpoint that do not depend on the path of the run or on kills."""


class Killed(Exception):
    """Simulated end of the process."""


@contextmanager
def killed_at(step: int, when: str = "after") -> Iterator[None]:
    """End the process in the block before or after the checkpoint of a step is written."""
    save, begin = checkpoint_writer.save_checkpoint, checkpoint_writer.CheckpointWriter.save

    def dies(folder: Path, checkpoint: Checkpoint) -> None:
        if when == "after" or checkpoint.step != step:
            save(folder, checkpoint)
        if checkpoint.step == step:
            raise Killed

    def begin_and_wait(self: checkpoint_writer.CheckpointWriter, *arguments: Any) -> None:
        begin(self, *arguments)
        self.finish()  # otherwise training would continue for a while after the kill

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint_writer, "save_checkpoint", dies)
        patch.setattr(checkpoint_writer.CheckpointWriter, "save", begin_and_wait)
        yield


def same_bits(one: FitResult, other: FitResult) -> bool:
    """Whether two runs ended with the same last checkpoint."""
    folders = one.checkpoint.folder, other.checkpoint.folder
    assert folders[0] and folders[1]
    return all((folders[0] / n).read_bytes() == (folders[1] / n).read_bytes() for n in SAME_BITS)
