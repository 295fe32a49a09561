"""The ladder of the published sizes in miniature: along every axis, three growths, no jump."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tokengrow.data.store import TokenStore
from tokengrow.distributed.fabric import FabricConfig
from tokengrow.metrics.logger_collection import LoggerConfig
from tokengrow.model.config import ModelConfig
from tokengrow.training.recipe import resolve_train
from tokengrow.training.trainer import fit


@pytest.mark.slow
def test_the_loss_goes_on_where_it_stood_at_each_growth(
    composed: Callable[..., dict[str, Any]], store: TokenStore, tmp_path: Path
) -> None:
    values = composed("train", "recipes=ladder-tiny", "max_steps_per_stage=4", "optim.lr=3e-4")
    run = replace(
        resolve_train(values),
        out=str(tmp_path / "run"),
        validation_sequences=8,
        fabric=FabricConfig(accelerator="cpu", precision="32-true"),
        logger=LoggerConfig(kinds=[]),
    )
    state = fit(run, store).state
    assert len(state.rungs) == 4
    for rung in state.rungs[1:]:
        assert rung.loss_start == pytest.approx(rung.loss_before, abs=1e-5)
        assert rung.loss_end < rung.loss_start


def test_it_has_the_shape_ratios_of_the_published_sizes(
    composed: Callable[..., dict[str, Any]],
) -> None:
    run = resolve_train(composed("train", "recipes=ladder-tiny"))
    for stage, name in zip(run.stages, ("150m", "450m", "900m", "1.5b"), strict=True):
        published = ModelConfig.preset(name)
        assert stage.model.width * 8 == published.width
        assert stage.model.layers * 2 == published.layers
        for (_, mine), (_, theirs) in zip(
            stage.model.tokens.items(), published.tokens.items(), strict=True
        ):
            assert mine * 8 == theirs


def test_the_full_ladder_ends_at_the_published_sizes(
    composed: Callable[..., dict[str, Any]],
) -> None:
    given = ["data.prefix=files/pile", "tokenizer.file=tokenizer.json"]
    run = resolve_train(composed("train", "recipes=ladder-150m-to-1.5b", *given))
    for stage in run.stages:
        published = ModelConfig.preset(stage.name)
        assert stage.model.num_parameters() == published.num_parameters()
        assert stage.model.rotary_channels == 16
        assert stage.model.tau == run.stages[0].model.tau
