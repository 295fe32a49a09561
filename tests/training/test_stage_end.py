"""A stage that its plateau ends before its steps: what comes then, also in a resumed run."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from killed import killed_at, same_bits
from rich.console import Console

from tokengrow.checkpoint.schema import TrainState, Validation
from tokengrow.data.store import TokenStore
from tokengrow.errors import UserError
from tokengrow.growth.config import GrowthConfig
from tokengrow.model.config import ModelConfig
from tokengrow.optim.config import OptimConfig
from tokengrow.training.config import TrainConfig
from tokengrow.training.plateau import PlateauConfig, reached_plateau
from tokengrow.training.trainer import FitResult, Trainer, fit

Runs = Callable[..., TrainConfig]


def at_a_plateau(run: TrainConfig, steps: int = 20) -> TrainConfig:
    """Return the run at a constant rate with stages that end at their second validation, step 6."""
    rule = PlateauConfig(patience=1, min_delta=100.0)  # no second validation is that much better
    return replace(
        run,
        stages=tuple(
            replace(
                stage, steps=steps, plateau=rule, optim=replace(stage.optim, schedule="constant")
            )
            for stage in run.stages
        ),
    )


@pytest.fixture(scope="module")
def flattened(tiny_run: Runs, store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A ladder of two rungs, each ended by its plateau, in one go; not to be written to."""
    run = tiny_run(tmp_path_factory.mktemp("flattened") / "run", rungs=(8, 12))
    return fit(at_a_plateau(run), store)


def test_a_stage_at_a_plateau_ends_and_the_next_one_grows(flattened: FitResult) -> None:
    state = flattened.state
    assert state.stage_ends == [6, 12]
    history = [(row.stage, row.step) for row in state.validation]
    assert history == [(0, 0), (0, 3), (0, 6), (1, 6), (1, 9), (1, 12)]
    first, grown = state.rungs
    assert first.tokens == grown.tokens == 6 * 4 * 32  # updates of 4 sequences of 32 tokens
    assert first.loss_end == state.validation[2].loss
    assert grown.loss_start == pytest.approx(first.loss_end, abs=1e-5)
    assert grown.loss_end is not None and grown.loss_end < first.loss_end


def test_stage_ended_by_rule_equals_stage_with_those_steps(
    flattened: FitResult, tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    given = at_a_plateau(tiny_run(tmp_path / "run", rungs=(8, 12)), steps=6)
    stages = tuple(replace(stage, plateau=None) for stage in given.stages)
    assert same_bits(fit(replace(given, stages=stages), store), flattened)


def test_a_stage_that_its_steps_end_has_no_plateau(
    tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    said = io.StringIO()
    run = at_a_plateau(tiny_run(tmp_path / "run", rungs=(8,)), steps=5)
    state = fit(run, store, Console(file=said)).state
    assert [row.step for row in state.validation] == [0, 3, 5]
    assert "plateau" not in said.getvalue()


def test_what_ended_a_stage_is_said(tiny_run: Runs, store: TokenStore, tmp_path: Path) -> None:
    said = io.StringIO()
    run = at_a_plateau(tiny_run(tmp_path / "run", rungs=(8,)))
    fit(run, store, Console(file=said, width=40))
    line = "stage n8 ends at a plateau (patience 1, min_delta 100) after 6 of at most 20 steps\n"
    assert line in said.getvalue()


@pytest.mark.parametrize(
    ("checkpoint_every", "step"),
    [(4, 4), (4, 6), (4, 10), (4, 12), (3, 3), (3, 6)],  # 3: one is due where the stage ends
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_around_plateau_resumes_bit_identically(
    flattened: FitResult,
    tiny_run: Runs,
    store: TokenStore,
    tmp_path: Path,
    checkpoint_every: int,
    step: int,
    when: str,
) -> None:
    run = tiny_run(tmp_path / "run", rungs=(8, 12), checkpoint_every=checkpoint_every)
    run = at_a_plateau(run)
    with killed_at(step, when):
        fit(run, store)
    assert same_bits(fit(run, store), flattened)


def test_a_stage_does_not_end_while_tau_is_on_its_way(
    tiny_run: Runs, tiny_model: Callable[..., ModelConfig], store: TokenStore, tmp_path: Path
) -> None:
    run = at_a_plateau(tiny_run(tmp_path / "run", rungs=(8, 12)))
    stages = (run.stages[0], replace(run.stages[1], model=tiny_model(12)))
    growth = GrowthConfig(tau="anneal", anneal_steps=8)
    done = fit(replace(run, stages=stages, growth=growth), store)
    # The rule's two validations are those of the updates 9 and 12.
    assert done.state.stage_ends == [6, 6 + 12]
    assert done.checkpoint.config.tau == tiny_model(12).tau


def test_only_losses_from_an_update_on_count() -> None:
    state = TrainState("tokens", step=30, stage=1, stage_step=20)
    for step, loss in ((10, 4.0), (15, 5.0), (20, 5.0), (25, 4.0), (30, 3.0)):
        state.validation.append(Validation(step, stage=1, tokens=0, flops=0.0, loss=loss))
    assert state.losses() == [5.0, 5.0, 4.0, 3.0]
    assert state.losses(since=10) == [5.0, 4.0, 3.0]
    rule = PlateauConfig(patience=1, min_delta=0.01)
    assert reached_plateau(state.losses(), rule)
    assert not reached_plateau(state.losses(since=10), rule)


def test_a_run_that_ended_at_a_plateau_is_finished(
    tiny_run: Runs, store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = at_a_plateau(tiny_run(tmp_path / "run", rungs=(8,)))
    first = fit(run, store)
    monkeypatch.setattr(Trainer, "train_stage", None)  # would fail if it were called
    assert fit(run, store).state == first.state


# What a resumed run must share


@pytest.fixture
def halfway(tiny_run: Runs, store: TokenStore, tmp_path: Path) -> TrainConfig:
    """A run that was killed after four steps of its first stage."""
    run = at_a_plateau(tiny_run(tmp_path / "run", rungs=(8, 12)))
    with killed_at(4):
        fit(run, store)
    return run


@pytest.mark.parametrize("key", ["validation_every", "validation_sequences"])
def test_validations_that_may_end_the_stage_cannot_change(
    halfway: TrainConfig, store: TokenStore, key: str
) -> None:
    with pytest.raises(UserError, match=rf"another configuration: {key} must be [38], got 4"):
        fit(replace(halfway, **{key: 4}), store)


def test_the_rule_of_a_stage_cannot_change(halfway: TrainConfig, store: TokenStore) -> None:
    first, second = halfway.stages
    longer = replace(first, plateau=PlateauConfig(patience=2, min_delta=100.0))
    with pytest.raises(UserError, match=r"stages\.n8\.plateau\.patience must be 1, got 2"):
        fit(replace(halfway, stages=(longer, second)), store)
    none = replace(first, plateau=None)
    with pytest.raises(UserError, match=r"stages\.n8\.plateau must be \{.*\}, got None"):
        fit(replace(halfway, stages=(none, second)), store)


def test_between_two_stages_validations_may_change(
    tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    run = at_a_plateau(tiny_run(tmp_path / "run", rungs=(8, 12)))
    fit(replace(run, stages=run.stages[:1]), store)
    assert fit(replace(run, validation_every=2), store).state.stage_ends == [6, 6 + 4]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "neox_cosine"])
def test_a_plateau_needs_a_constant_rate(tiny_run: Runs, schedule: str) -> None:
    (stage,) = at_a_plateau(tiny_run(Path("run"), rungs=(8,))).stages
    with pytest.raises(UserError, match=rf"optim.schedule must be constant .* got {schedule}"):
        replace(stage, optim=OptimConfig(schedule=schedule))
