"""A sweep: each job in a folder of its own, its last validation loss the objective."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokengrow.checkpoint.store import load_checkpoint
from tokengrow.cli import train as verb
from tokengrow.data.store import TokenStore


def test_two_seeds_are_two_runs_with_their_losses_as_objectives(
    command: Callable[..., Any], store: TokenStore, tmp_path: Path, monkeypatch: Any
) -> None:
    objectives: list[float] = []
    train = verb.train
    monkeypatch.setattr(verb, "train", lambda config: objectives.append(train(config)))
    outcome = command(
        "train",
        "-m",
        "seed=0,1",
        "recipes=quickstart",
        "model.vocab_size=512",
        "model.context_length=32",
        "model.layers=1",
        "model.width=32",
        "max_steps_per_stage=1",
        "validation_sequences=4",
        "fabric=cpu",
        f"store={store.folder}",
        f"out={tmp_path / 'sweep'}",
    )
    assert outcome.status == 0, outcome.err
    runs = [load_checkpoint(tmp_path / "sweep" / name) for name in ("0", "1")]
    assert [run.run["seed"] for run in runs] == [0, 1]
    assert [run.train_state["rungs"][-1]["loss_end"] for run in runs] == objectives
    assert objectives[0] != objectives[1]
