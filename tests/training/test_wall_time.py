"""Wall-clock time of a model over sessions, kills and growths."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from killed import killed_at

from tokengrow.checkpoint.layout import COMPLETE, TIMES, write_marker
from tokengrow.checkpoint.schema import SourceCost, WallTimes
from tokengrow.checkpoint.store import load_checkpoint
from tokengrow.data.store import TokenStore
from tokengrow.growth.checkpoint import grow_checkpoint
from tokengrow.growth.plan import plan_growth
from tokengrow.training.config import TrainConfig
from tokengrow.training.resume import source_cost
from tokengrow.training.trainer import fit
from tokengrow.training.wall_time import WallTime

Runs = Callable[..., TrainConfig]


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Value of `time.monotonic`: its one entry, which a test may set."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def forget_times(checkpoint: Path) -> None:
    """Makes a checkpoint one of before times were kept."""
    (checkpoint / TIMES).unlink()
    (checkpoint / COMPLETE).unlink()
    write_marker(checkpoint)


def test_a_session_goes_on_from_the_seconds_of_the_checkpoint(hands: list[float]) -> None:
    first = WallTime()
    hands[0] += 3
    first.note_validation()
    hands[0] += 4
    saved = first.times()
    assert saved == WallTimes(seconds=7.0, before=0.0, validation=(3.0,))
    hands[0] += 1000  # lost by a kill, and the time until the restart
    second = WallTime.resumed(saved, validations=1)
    hands[0] += 2
    second.note_validation()
    assert second.times() == WallTimes(seconds=9.0, before=0.0, validation=(3.0, 9.0))


def test_what_lies_behind_the_source_is_kept_apart(hands: list[float]) -> None:
    clock = WallTime.starting_from(WallTimes(7.0, 5.0, (3.0,)))
    hands[0] += 2
    clock.note_validation()
    assert clock.times() == WallTimes(seconds=2.0, before=12.0, validation=(2.0,))


def test_a_source_without_times_leaves_the_time_before_unknown(hands: list[float]) -> None:
    assert WallTime.starting_from(None).times() == WallTimes(0.0, None, ())


def test_a_run_of_before_times_were_kept_goes_on_without_them(
    tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    run = tiny_run(tmp_path / "run", rungs=(8,))
    with killed_at(4):
        fit(run, store)
    forget_times(tmp_path / "run" / "step_00000004")
    times = fit(run, store).checkpoint.times
    assert times == WallTimes(None, None, (None, None, None))


def test_a_checkpoint_has_the_time_of_each_of_its_validations(
    tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    run = tiny_run(tmp_path / "run", rungs=(8, 12))
    with killed_at(10):
        fit(run, store)
    done = fit(run, store)
    times = done.checkpoint.times
    assert times is not None and times.validation is not None and times.seconds is not None
    ends = [second for second in times.validation if second is not None]
    assert len(ends) == len(done.state.validation)
    assert ends == sorted(ends)
    assert 0 < ends[0] < ends[-1] < times.seconds < 60
    assert times.before == 0


def test_growth_outside_a_run_keeps_cost_of_source(
    tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    source = fit(tiny_run(tmp_path / "run", rungs=(8,), steps=2), store).checkpoint
    target = tiny_run(tmp_path, rungs=(8, 12)).stages[1].model
    grown = grow_checkpoint(source, plan_growth(source.config, target))
    assert source.times is not None and source.train_state is not None
    assert grown.times == WallTimes(source.times.seconds, 0.0, validation=None)
    state = grown.train_state
    assert state is not None
    assert (state.tokens, state.flops) == (2 * 4 * 32, source.train_state.flops)


def test_a_run_notes_what_it_starts_from_and_what_that_had_cost(
    tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    first = fit(tiny_run(tmp_path / "first", rungs=(8,), steps=2), store)
    folder = first.checkpoint.folder
    assert folder is not None
    second = fit(tiny_run(tmp_path / "second", rungs=(12,), steps=2, source=str(folder)), store)
    marker = json.loads((folder / COMPLETE).read_text())
    assert second.state.source == SourceCost(
        weights_sha256=marker["model.safetensors"]["sha256"],
        step=2,
        tokens=2 * 4 * 32,
        flops=first.state.flops,
    )
    # A run of an older version, which recorded no cost of its source, has an unknown cost.
    old = replace(second.checkpoint, train_state=replace(second.state, source=None))
    assert (source_cost(old).tokens, source_cost(old).flops) == (None, None)
    third_run = tiny_run(tmp_path / "third", rungs=(12,), steps=1, source=str(tmp_path / "second"))
    third = fit(third_run, store)
    assert third.state.source is not None
    assert third.state.source.flops == first.state.flops + second.state.flops
    seconds = [run.checkpoint.times.seconds for run in (first, second)]
    assert load_checkpoint(tmp_path / "third").times.before == pytest.approx(sum(seconds))
