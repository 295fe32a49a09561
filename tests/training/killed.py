"""Runs that are killed, and whether they end as one that was not."""

from tokengrow.training.fit import FitResult

SAME_BITS = ("model.safetensors", "optimizer.safetensors", "train_state.json", "lineage.json")
"""Files of a checkpoint that do not depend on where the run lies, or how often it was killed."""


class Killed(Exception):
    """Stands for the end of the process."""


def same_bits(one: FitResult, other: FitResult) -> bool:
    """Whether two runs ended with the same last checkpoint."""
    folders = one.checkpoint.folder, other.checkpoint.folder
    assert folders[0] and folders[1]
    return all((folders[0] / n).read_bytes() == (folders[1] / n).read_bytes() for n in SAME_BITS)
