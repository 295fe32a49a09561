"""Training a Transformer: the loop, its checkpoints and its resumption are a TokenFormer's."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import killed_at, same_bits

from tokengrow.checkpoint.store import Checkpoint, load_checkpoint, save_checkpoint
from tokengrow.data.store import TokenStore
from tokengrow.distributed.fabric import FabricConfig
from tokengrow.errors import UserError
from tokengrow.files import read_yaml
from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.plan import plan_growth
from tokengrow.model.config import ModelConfig
from tokengrow.model.transformer import Transformer, TransformerConfig
from tokengrow.optim.config import OptimConfig, build_optimizer
from tokengrow.training.config import StageConfig, TrainConfig
from tokengrow.training.trainer import fit

Runs = Callable[..., TrainConfig]
Sized = Callable[..., TransformerConfig]


def losses(config: TrainConfig, store: TokenStore) -> list[float]:
    return [row.loss for row in fit(config, store).state.validation]


def test_the_loss_falls(transformer_run: Runs, store: TokenStore, tmp_path: Path) -> None:
    first, *_, last = losses(transformer_run(tmp_path / "run", steps=80), store)
    assert first == pytest.approx(6.24, abs=0.1)  # of 512 equally likely tokens, ln 512
    assert last < first - 0.9


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_a_save_it_ends_with_the_same_bits(
    transformer_run: Runs, store: TokenStore, tmp_path: Path, when: str
) -> None:
    whole = fit(transformer_run(tmp_path / "whole"), store)
    with killed_at(4, when):
        fit(transformer_run(tmp_path / "killed"), store)
    assert same_bits(fit(transformer_run(tmp_path / "killed"), store), whole)


def test_a_checkpoint_holds_the_model(
    transformer_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    saved = fit(transformer_run(tmp_path / "run"), store).checkpoint
    assert saved.folder
    assert read_yaml(saved.folder / "config.yaml")["model"]["architecture"] == "transformer"
    loaded = load_checkpoint(saved.folder)
    assert isinstance(loaded.model, Transformer)
    ids = torch.arange(32)[None]
    assert torch.equal(loaded.model(ids), saved.model(ids))


def test_a_bare_model_is_saved_and_loaded(tiny_transformer: Sized, tmp_path: Path) -> None:
    model = Transformer(replace(tiny_transformer(), tied=False))
    loaded = load_checkpoint(save_checkpoint(tmp_path / "bare", model))
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.weights[name], tensor)


def test_a_second_stage_goes_on_where_the_first_one_stood(
    transformer_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    run = transformer_run(tmp_path / "run", steps=4, growth=GrowthConfig(tau="anneal"))
    (only,) = run.stages
    run = replace(run, stages=(only, replace(only, name="more")))
    first, second = fit(run, store).state.rungs
    assert second.loss_start == first.loss_end
    assert second.drift is None and second.tau_start is None


def test_compiled_and_recomputed_it_is_the_same_run(
    transformer_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    wanted = losses(transformer_run(tmp_path / "plain"), store)
    compiled = losses(transformer_run(tmp_path / "compiled", compile=True), store)
    torch.compiler.reset()
    assert compiled == pytest.approx(wanted, rel=1e-5)
    for what in ("selective", "block"):
        fabric = FabricConfig(accelerator="cpu", precision="32-true", activation_checkpointing=what)
        assert losses(transformer_run(tmp_path / what, fabric=fabric), store) == wanted


def test_biases_and_norms_do_not_decay(tiny_transformer: Sized) -> None:
    model = Transformer(replace(tiny_transformer(), tied=False))
    decayed, undecayed = build_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[p].rpartition(".")[2] for p in decayed["params"]} == {"weight"}
    assert not any("norm" in names[p] for p in decayed["params"])
    assert len(decayed["params"]) == 2 + 2 * 4  # embedding, head, 2 layers of 4 matrices
    assert len(undecayed["params"]) == 2 + 2 * (4 + 2 * 2)
    assert undecayed["weight_decay"] == 0.0


@pytest.mark.parametrize("kernel", ["reference", "compiled", "fp8"])
def test_a_kernel_of_pattention_is_refused(
    kernel: str, transformer_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    message = f"kernel={kernel} in stage only: it computes Pattention, which a Transformer does not"
    with pytest.raises(UserError, match=message):
        fit(transformer_run(tmp_path / "run", kernel=kernel), store)
    assert not (tmp_path / "run").exists()


# What does not grow


def grows_not(source: Any, target: Any, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        plan_growth(source, target)


def test_it_may_stay_what_it_is(tiny_transformer: Sized) -> None:
    plan = plan_growth(tiny_transformer(), tiny_transformer())
    assert plan.steps == () and plan.final_target == tiny_transformer()


def test_no_other_size_is_planned(tiny_transformer: Sized) -> None:
    said = "model must keep the sizes of the source, because a transformer does not grow. Remove "
    grows_not(tiny_transformer(), tiny_transformer(layers=4), said)


def test_neither_becomes_the_other(
    tiny_transformer: Sized, tiny_model: Callable[..., ModelConfig]
) -> None:
    said = "model.architecture must stay tokenformer, got transformer. Growth cannot change it."
    grows_not(tiny_model(), tiny_transformer(), said)
    said = "model.architecture must stay transformer, got tokenformer. Growth cannot change it."
    grows_not(tiny_transformer(), tiny_model(), said)


def test_a_ladder_of_two_sizes_is_refused(
    transformer_run: Runs, tiny_transformer: Sized, tmp_path: Path
) -> None:
    run = transformer_run(tmp_path / "run")
    (only,) = run.stages
    deeper = StageConfig(name="deeper", steps=4, model=tiny_transformer(layers=4), optim=only.optim)
    with pytest.raises(UserError, match=r"stages\.deeper\.model must keep the sizes of the source"):
        replace(run, stages=(only, deeper))


def test_a_checkpoint_of_the_other_is_no_source(
    transformer_run: Runs, source: Path, store: TokenStore, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"stay tokenformer, got transformer\. Growth cannot"):
        fit(transformer_run(tmp_path / "run", source=str(source)), store)
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_from_a_checkpoint_of_its_own_size(
    transformer_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    first: Checkpoint = fit(transformer_run(tmp_path / "first"), store).checkpoint
    run = transformer_run(tmp_path / "second", source=str(first.folder))
    rung = fit(run, store).state.rung
    assert rung.loss_start == rung.loss_before
    assert rung.loss_start == first.train_state.validation[-1].loss
