"""A ladder for commands that start several processes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tokengrow.data.store import TokenStore

RECIPE = """\
# @package _global_
name: climb
batch_size: 4
micro_batch_size: 1
validation_every: 10
validation_sequences: 8
checkpoint_every: 10
log_every: 1
optim: {lr: 3e-3, min_lr: 3e-4, warmup_steps: 5}
model:
  vocab_size: 512
  context_length: 32
  layers: 2
  width: 32
  heads: 2
  tokens: {query: 8, key: 8, value: 8, output: 8, ffn: 16}
stages:
  small: {steps: 4}
  large: {steps: 4, model: {tokens: {query: 16, value: 16, ffn: 32}}}
"""


@pytest.fixture
def arguments(store: TokenStore, tmp_path: Path) -> Callable[..., list[str]]:
    """`arguments(*more)`: what `tokengrow` is called with to train a ladder of two sizes."""
    recipe = tmp_path / "mine" / "recipes" / "climb.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text(RECIPE)
    own = ["train", "--config-dir", str(tmp_path / "mine"), "recipes=climb"]
    return lambda *more: [*own, f"store={store.folder}", "fabric.accelerator=cpu", *more]
