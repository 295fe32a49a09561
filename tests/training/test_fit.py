"""The loop over stages: growth keeps the loss, a killed run ends with the same bits, and what
stays on the disk."""

import gc
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import Killed, killed_at, same_bits
from torch import Tensor

from tokengrow.checkpoint.layout import SESSIONS, WEIGHTS, find_checkpoints
from tokengrow.checkpoint.store import load_checkpoint
from tokengrow.data.megatron import export_store
from tokengrow.data.megatron_source import MegatronConfig, MegatronSource
from tokengrow.data.store import TokenStore
from tokengrow.errors import UserError
from tokengrow.files import directory_lock, sha256
from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.plan import plan_growth
from tokengrow.metrics.logger_collection import LoggerConfig
from tokengrow.model.config import ModelConfig
from tokengrow.training import batches, stage
from tokengrow.training.config import TrainConfig
from tokengrow.training.module import TokenFormerModule
from tokengrow.training.trainer import FitResult, Trainer, fit

Runs = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def climbed(tiny_run: Runs, store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A ladder of three rungs of six updates each, in one go; not to be written to."""
    return fit(tiny_run(tmp_path_factory.mktemp("climbed") / "run"), store)


def out_of(result: FitResult) -> Path:
    assert result.checkpoint.folder is not None
    return result.checkpoint.folder.parent


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a directory."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def steps_kept(out: Path) -> list[int]:
    return [int(folder.name.removeprefix("step_")) for folder in find_checkpoints(out)]


# What a ladder does


def test_a_growth_keeps_the_validation_loss(climbed: FitResult) -> None:
    first, *grown = climbed.state.rungs
    assert first.loss_before is None
    assert [rung.name for rung in grown] == ["n12", "n16"]
    for rung in grown:
        assert rung.loss_start == pytest.approx(rung.loss_before, abs=1e-5)


def test_every_rung_learns(climbed: FitResult) -> None:
    for rung in climbed.state.rungs:
        assert rung.loss_start is not None and rung.loss_end is not None
        assert rung.loss_end < rung.loss_start - 0.05


def test_the_rungs_count_their_tokens_and_flops(climbed: FitResult) -> None:
    # 6 updates of 4 sequences of 32 tokens. FLOPs of a token: 6 P + 6 L T H C, L = 2, T = H C = 32.
    tokens = 6 * 4 * 32
    for rung in climbed.state.rungs:
        assert rung.tokens == tokens
        assert rung.flops == tokens * (6 * rung.parameters + 6 * 2 * 32 * 32)
    assert climbed.state.tokens == 3 * tokens
    assert climbed.state.flops == sum(rung.flops for rung in climbed.state.rungs)


def test_the_lineage_names_what_each_size_was_grown_from(climbed: FitResult) -> None:
    lineage = climbed.checkpoint.lineage
    assert [entry.steps[0].axis for entry in lineage] == ["tokens", "tokens"]
    for entry, stage_end in zip(lineage, ("step_00000006", "step_00000012"), strict=True):
        assert entry.drift.dtype == "float64"
        assert entry.drift.max_logit < 1e-10
        assert entry.source.weights_sha256 == sha256(out_of(climbed) / stage_end / WEIGHTS)
        assert entry.source.step == int(stage_end.removeprefix("step_"))


def test_a_run_leaves_a_validation_history(climbed: FitResult) -> None:
    history = [(row.stage, row.step) for row in climbed.state.validation]
    assert history == [(0, 0), (0, 3), (0, 6), (1, 6), (1, 9), (1, 12), (2, 12), (2, 15), (2, 18)]


def test_micro_batches_change_the_losses_by_rounding_alone(
    tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    losses = []
    for micro in (8, 2):
        run = tiny_run(tmp_path / str(micro), rungs=(8, 12), batch_size=8, micro_batch_size=micro)
        losses.append([row.loss for row in fit(run, store).state.validation])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_ladder_along_every_axis_has_no_jump(
    tiny_run: Runs, tiny_model: Callable[..., ModelConfig], store: TokenStore, tmp_path: Path
) -> None:
    run = tiny_run(tmp_path / "run", rungs=(8,), steps=4)
    sizes = [{"width": 40}, {"heads": 3}, {"layers": 4}, {"tokens": tiny_model(12).tokens}]
    stages = [run.stages[0]]
    for number, changes in enumerate(sizes):
        model = plan_growth(stages[-1].model, replace(stages[-1].model, **changes)).target
        stages.append(replace(stages[0], name=f"more{number}", model=model))
    done = fit(replace(run, stages=tuple(stages)), store)
    assert done.state.step == 4 * 5
    for rung in done.state.rungs[1:]:
        assert rung.loss_start == pytest.approx(rung.loss_before, abs=1e-5)
        assert rung.loss_end < rung.loss_start
    axes = [entry.steps[0].axis for entry in done.checkpoint.lineage]
    assert axes == ["width", "heads", "depth", "tokens"]


def test_a_stage_may_train_at_the_size_of_the_one_before(
    tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    run = tiny_run(tmp_path / "run", rungs=(8,), steps=2)
    (stage,) = run.stages
    twice = fit(tiny_run(tmp_path / "run", stages=(stage, replace(stage, name="more"))), store)
    assert twice.checkpoint.lineage == ()
    assert twice.state.rung.drift is None
    assert twice.state.step == 4


# Killed and resumed


@pytest.mark.parametrize("step", [4, 6, 10, 18], ids=lambda step: f"step_{step}")
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_checkpoint_resumes_bit_identically(
    climbed: FitResult,
    tiny_run: Runs,
    store: TokenStore,
    tmp_path: Path,
    step: int,
    when: str,
) -> None:
    run = tiny_run(tmp_path / "run")
    with killed_at(step, when):
        fit(run, store)
    assert same_bits(fit(run, store), climbed)


def test_killed_after_growth_resumes_bit_identically(
    climbed: FitResult,
    tiny_run: Runs,
    store: TokenStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grow = stage.grow_checkpoint

    def dies(*arguments: Any) -> None:
        grow(*arguments)
        raise Killed

    run = tiny_run(tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(stage, "grow_checkpoint", dies)
        fit(run, store)
    assert same_bits(fit(run, store), climbed)


def test_a_stages_model_is_gone_before_the_next_one_is_made(
    tiny_run: Runs, store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grow, alive = stage.grow_checkpoint, []

    def counted(*arguments: Any) -> Any:
        gc.collect()
        alive.append(sum(type(found) is TokenFormerModule for found in gc.get_objects()))
        return grow(*arguments)

    gc.collect()
    before = sum(type(found) is TokenFormerModule for found in gc.get_objects())
    monkeypatch.setattr(stage, "grow_checkpoint", counted)
    fit(tiny_run(tmp_path / "run", (8, 12, 16), steps=2), store)
    assert alive == [before, before]


def test_killed_on_megatron_files_resumes_bit_identically(
    tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    train, validation = export_store(store, tmp_path / "files")
    files = MegatronConfig(prefix=train, validation_prefix=validation)

    def tokens() -> MegatronSource:
        return MegatronSource.open(
            files, store.tokenizer(), samples=72, context_length=32, seed=0, cache=tmp_path
        )

    whole = fit(tiny_run(tmp_path / "whole"), tokens())
    run = tiny_run(tmp_path / "run")

    with killed_at(10):  # in the middle of the second stage
        fit(run, tokens())
    assert same_bits(fit(run, tokens()), whole)


def test_damaged_checkpoint_is_quarantined(
    climbed: FitResult, tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    run = tiny_run(tmp_path / "run")
    folder = fit(run, store).checkpoint.folder
    assert folder is not None
    (folder / WEIGHTS).write_bytes(b"damaged")
    assert same_bits(fit(run, store), climbed)
    assert (folder.with_name(f"{folder.name}.damaged") / WEIGHTS).read_bytes() == b"damaged"


def test_finished_run_started_again_changes_nothing(
    tiny_run: Runs, store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tmp_path / "run", rungs=(8, 12), steps=2, logger=LoggerConfig())
    first = fit(run, store)
    before = contents(tmp_path)
    monkeypatch.setattr(Trainer, "train_stage", None)  # would fail if it were called
    again = fit(run, store)
    assert contents(tmp_path) == before
    assert again.state == first.state


def test_a_finished_ladder_can_be_given_another_rung(
    climbed: FitResult, tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    fit(tiny_run(tmp_path / "run", rungs=(8, 12)), store)
    assert same_bits(fit(tiny_run(tmp_path / "run", rungs=(8, 12, 16)), store), climbed)


# From another run's checkpoint


def test_run_grows_checkpoint_of_another_run(
    climbed: FitResult, tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    source = out_of(climbed) / "step_00000012"  # the end of the second rung
    grown = fit(tiny_run(tmp_path / "run", rungs=(16,), steps=2, source=str(source)), store)
    assert grown.state.step == 2, "a run of its own: it counts its own steps"
    assert grown.state.rungs[0].loss_start == pytest.approx(
        climbed.state.rungs[1].loss_end, abs=1e-5
    )
    assert [entry.source.step for entry in grown.checkpoint.lineage] == [6, 12]


def test_checkpoint_config_is_that_of_trained_model(
    climbed: FitResult, tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    # The config of the stage has tau = sqrt(16); a growth keeps that of the source, sqrt(8).
    source = out_of(climbed) / "step_00000012"
    run = tiny_run(tmp_path / "run", rungs=(16,), steps=2, source=str(source))
    assert fit(run, store).checkpoint.config.tau == climbed.checkpoint.config.tau


def test_the_optimizer_state_of_the_source_is_carried_on(
    climbed: FitResult, tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    source = out_of(climbed) / "step_00000012"
    grown = fit(tiny_run(tmp_path / "run", rungs=(16,), steps=2, source=str(source)), store)
    assert grown.checkpoint.optimizer["step.embedding.weight"] == 12 + 2
    # The same updates as in the ladder, were the batches the same: only the seed of those differs.
    assert grown.checkpoint.optimizer["exp_avg.blocks.0.ffn.key_param_tokens"].shape == (32, 32)


# What stays on the disk


def test_the_newest_checkpoints_and_every_stage_end_are_kept(
    tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    run = tiny_run(tmp_path / "run", rungs=(8, 12), checkpoint_every=1, keep_checkpoints=2)
    fit(run, store)
    assert steps_kept(tmp_path / "run") == [6, 11, 12]


def test_with_one_checkpoint_to_keep_the_stage_ends_remain(
    tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    run = tiny_run(tmp_path / "run", rungs=(8, 12), checkpoint_every=1, keep_checkpoints=1)
    fit(run, store)
    assert steps_kept(tmp_path / "run") == [6, 12]


def test_nothing_temporary_is_left_beside_the_checkpoints(climbed: FitResult) -> None:
    assert sorted(path.name for path in out_of(climbed).iterdir()) == [
        "config.yaml",
        SESSIONS,
        "step_00000006",
        "step_00000012",
        "step_00000016",
        "step_00000018",
    ]


def test_the_last_checkpoint_holds_the_runs_state_and_tokenizer(
    climbed: FitResult, store: TokenStore
) -> None:
    folder = climbed.checkpoint.folder
    assert folder is not None
    assert json.loads((folder / "train_state.json").read_text()) == climbed.state.to_dict()
    assert climbed.checkpoint.tokenizer == store.tokenizer().to_json()


def test_a_run_from_a_source_goes_on_in_its_data(
    tiny_run: Runs, store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fit(tiny_run(tmp_path / "first", rungs=(8,), steps=3), store).checkpoint.folder
    started: list[int] = []
    loader = batches.train_loader

    def noted(*arguments: Any, **settings: Any) -> Any:
        started.append(settings["start_batch"])
        return loader(*arguments, **settings)

    monkeypatch.setattr(batches, "train_loader", noted)
    fit(tiny_run(tmp_path / "next", rungs=(8,), steps=1, source=str(first)), store)
    twice = tiny_run(
        tmp_path / "twice", rungs=(8,), steps=1, source=str(first), batch_size=8, micro_batch_size=4
    )
    fit(twice, store)
    assert started == [3, 2]  # batches of 4: the fourth; of 8: after the 12 seen, rounded up


def test_checkpoint_without_marker_is_ignored(
    tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    run = tiny_run(tmp_path / "run", rungs=(8,))
    fit(run, store)
    (tmp_path / "run" / "step_00000006" / "COMPLETE").unlink()
    assert fit(run, store).state.step == 6
    assert (tmp_path / "run" / "step_00000006.damaged").is_dir()


def test_a_gpu_that_is_too_small_ends_the_run_in_one_sentence(
    tiny_run: Runs, store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Trainer, "train_step", full)
    with pytest.raises(UserError, match=r"stage n8 does not fit .* micro_batch_size=4. Lower"):
        fit(tiny_run(tmp_path / "run", rungs=(8,)), store)


def test_somebody_elses_config_is_not_overwritten(
    tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    theirs = tmp_path / "config.yaml"
    theirs.write_text("database: prod\n")
    with pytest.raises(UserError, match="holds files that are not a run"):
        fit(tiny_run(tmp_path), store)
    assert theirs.read_text() == "database: prod\n"


def test_a_second_run_in_one_folder_is_refused(
    tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    run = tiny_run(tmp_path / "run", rungs=(8,))
    (tmp_path / "run").mkdir()
    with directory_lock(tmp_path / "run"):
        with pytest.raises(UserError, match="is in use: another process trains this run"):
            fit(run, store)
        assert list((tmp_path / "run").iterdir()) == []
    assert fit(run, store).state.step == 6


# What a growth lets its user choose


def weights_of(result: FitResult, step: int) -> dict[str, Tensor]:
    return load_checkpoint(out_of(result) / f"step_{step:08d}").weights


def test_a_frozen_source_keeps_every_bit_through_the_stage(
    tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    growth = GrowthConfig(freeze_source=-1)
    done = fit(tiny_run(tmp_path / "run", (8, 12), growth=growth), store)
    before, after = weights_of(done, 6), weights_of(done, 12)
    for name, old in before.items():
        assert torch.equal(after[name][: len(old)], old)
        if name.endswith("_param_tokens"):
            assert (after[name][len(old) :] != 0).any(dim=1).all()


def test_annealed_tau_moves_from_source_to_published(
    tiny_run: Runs, tiny_model: Callable[..., ModelConfig], store: TokenStore, tmp_path: Path
) -> None:
    run = annealed(tiny_run(tmp_path / "run", (8, 12), checkpoint_every=2), tiny_model)
    done = fit(run, store)
    first, last = done.state.rungs
    assert last.loss_start == pytest.approx(first.loss_end, abs=1e-5)
    taus = [load_checkpoint(f).config.tau for f in find_checkpoints(out_of(done))[-2:]]
    assert taus[1] == tiny_model(12).tau
    # After 4 of 5 updates tau² is 8 + 4 / 5 (12 - 8).
    assert taus[0].query == pytest.approx(11.2**0.5)


def annealed(run: TrainConfig, tiny_model: Callable[..., ModelConfig]) -> TrainConfig:
    small, large = run.stages
    stages = (small, replace(large, model=tiny_model(12)))
    return replace(run, stages=stages, growth=GrowthConfig(tau="anneal", anneal_steps=5))


@pytest.mark.parametrize("lost", ["step_10", "step_12"])
def test_killed_during_annealing_resumes_bit_identically(
    tiny_run: Runs,
    tiny_model: Callable[..., ModelConfig],
    store: TokenStore,
    tmp_path: Path,
    lost: str,
) -> None:
    def run(name: str) -> TrainConfig:
        made = tiny_run(tmp_path / name, (8, 12), checkpoint_every=2, keep_checkpoints=9)
        growth = replace(annealed(made, tiny_model).growth, freeze_source=3, new_warmup_steps=5)
        return replace(annealed(made, tiny_model), growth=growth)

    whole, killed = fit(run("whole"), store), fit(run("killed"), store)
    for folder in find_checkpoints(out_of(killed)):
        if int(folder.name.removeprefix("step_")) >= int(lost.removeprefix("step_")):
            shutil.rmtree(folder)
    assert same_bits(fit(run("killed"), store), whole)


@pytest.mark.parametrize(
    "growth",
    [
        GrowthConfig(init="gram", tau="recompute"),
        GrowthConfig(optimizer="fresh", new_warmup_steps=3),
        GrowthConfig(new_lr_scale=2.0, new_warmup_steps=0),
    ],
    ids=["gram", "fresh", "faster"],
)
def test_every_exact_choice_keeps_the_loss_and_learns(
    tiny_run: Runs,
    tiny_model: Callable[..., ModelConfig],
    store: TokenStore,
    tmp_path: Path,
    growth: GrowthConfig,
) -> None:
    run = tiny_run(tmp_path / "run", (8, 48), growth=growth)
    if growth.tau == "recompute":
        run = replace(run, stages=(run.stages[0], replace(run.stages[1], model=tiny_model(48))))
    first, last = fit(run, store).state.rungs
    assert last.loss_start == pytest.approx(first.loss_end, abs=1e-5)
    assert last.loss_end is not None and last.loss_start is not None
    assert last.loss_end < last.loss_start
