"""A ladder that the command itself climbs, in processes that the tests stop, kill and starve."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from victim import Watched

from tokengrow.checkpoint.layout import OPTIMIZER, WEIGHTS, find_checkpoints
from tokengrow.data.store import TokenStore
from tokengrow.files import sha256

STAGES = """\
micro_batch_size: 2
checkpoint_every: 5
stages:
  small: {steps: 12}
  medium: {steps: 12, model: {tokens: {query: 16, value: 16, ffn: 32}}}
  large: {steps: 12, model: {width: 48, layers: 3}}
"""


@dataclass(frozen=True)
class Climb:
    """The ladder's command line, and how it ends when nothing stops it."""

    folder: Path
    """Holds its recipe."""
    store: TokenStore
    whole: Path
    """The run in one go; not to be written to."""

    def arguments(self, out: Path, *changes: str) -> list[str]:
        """`train ...` into a folder."""
        paths = ["--config-dir", str(self.folder), "recipes=climb", f"store={self.store.folder}"]
        return ["train", *paths, "fabric=cpu", f"out={out}", *changes]

    def ended_as_whole(self, out: Path) -> bool:
        """Whether a run's last checkpoint has the weights and moments of the run in one go."""
        return last_bits(out) == last_bits(self.whole)


def last_bits(out: Path) -> tuple[str, ...]:
    """Name of a run's last checkpoint, and the hashes of its tensors."""
    folder = find_checkpoints(out)[-1]
    return folder.name, *(sha256(folder / name) for name in (WEIGHTS, OPTIMIZER))


@pytest.fixture(scope="session")
def climb(
    store: TokenStore,
    tiny_recipe: Callable[[Path, str], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Climb:
    """The command of a ladder of three stages of twelve updates each."""
    folder = tmp_path_factory.mktemp("climb")
    tiny_recipe(folder, STAGES)
    made = Climb(folder, store, folder / "whole")
    assert Watched().run(made.arguments(made.whole), folder / "log") == 0
    return made
