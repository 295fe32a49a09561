"""Command line of a small ladder for commands that start several processes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tokengrow.data.store import TokenStore

STAGES = """\
micro_batch_size: 1
checkpoint_every: 10
stages:
  small: {steps: 4}
  large: {steps: 4, model: {tokens: {query: 16, value: 16, ffn: 32}}}
"""


@pytest.fixture
def train_arguments(
    store: TokenStore, tiny_recipe: Callable[[Path, str], None], tmp_path: Path
) -> Callable[..., list[str]]:
    """`train_arguments(*overrides)`: arguments of `tokengrow` that train a ladder of two sizes."""
    tiny_recipe(tmp_path / "mine", STAGES)
    arguments = ["train", "--config-dir", str(tmp_path / "mine"), "recipes=climb"]
    arguments += [f"store={store.folder}", "fabric.accelerator=cpu"]
    return lambda *overrides: [*arguments, *overrides]
