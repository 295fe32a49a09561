"""The LightningModule: its loss by hand, and the same training under `lightning.Trainer` and the
loop."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from tokengrow.data.loader import train_loader, validation_loader
from tokengrow.data.sequences import Sequences
from tokengrow.data.store import TokenStore
from tokengrow.metrics.logger_collection import LoggerConfig
from tokengrow.model.tokenformer import TokenFormer
from tokengrow.training.config import TrainConfig
from tokengrow.training.module import TokenFormerModule
from tokengrow.training.trainer import fit


class Losses(lightning.Callback):
    """Keeps the loss of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.values.append(outputs["loss"].item())


def test_under_trainer_it_learns_what_it_learns_under_the_loop(
    tiny_run: Callable[..., TrainConfig], store: TokenStore, tmp_path: Path
) -> None:
    run = tiny_run(tmp_path / "run", rungs=(8,), steps=3, log_every=1, logger=LoggerConfig())
    end = fit(run, store)
    with next((tmp_path / "run").glob("logs/*/metrics.csv")).open() as file:
        looped = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]

    (stage,) = run.stages
    model = TokenFormer(stage.model)
    model.init_weights(torch.Generator().manual_seed(run.seed))
    losses = Losses()
    trainer = lightning.Trainer(
        max_steps=3,
        accelerator="cpu",
        gradient_clip_val=stage.optim.grad_clip,
        callbacks=[losses],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    training = train_loader(
        Sequences(store.split("train"), stage.model.context_length),
        seed=run.seed,
        batch_size=run.batch_size,
        micro_batch_size=run.batch_size,
    )
    validation = validation_loader(
        Sequences(store.split("validation"), stage.model.context_length),
        batch_size=run.micro_batch_size,
        max_sequences=run.validation_sequences,
    )
    module = TokenFormerModule(model, stage.optim, stage.steps)
    trainer.fit(module, training, validation)
    assert losses.values == pytest.approx(looped, rel=1e-6)
    assert len(looped) == 3
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, end.checkpoint.weights[name], atol=1e-6), name
    (validated,) = trainer.validate(module, validation, verbose=False)
    assert validated["validation/loss"] == pytest.approx(end.state.rung.loss_end, rel=1e-6)
