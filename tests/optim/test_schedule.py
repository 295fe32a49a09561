"""Learning rate of an update, computed by hand and compared with the published schedule."""

import json
from pathlib import Path
from typing import Any

import pytest

from tokengrow.optim.config import OptimConfig
from tokengrow.optim.schedule import learning_rate

GOLDEN = Path(__file__).parents[1] / "golden"
PUBLISHED = json.loads((GOLDEN / "F_learning_rate.json").read_text())["schedules"]
COSINE = OptimConfig(lr=1.0, min_lr=0.2, warmup_steps=4)


@pytest.mark.parametrize(
    ("update", "rate"),
    [
        (1, 0.25),  # lr / warmup_steps
        (2, 0.5),
        (4, 1.0),  # the peak
        (6, 0.2 + 0.8 * (2 + 2**0.5) / 4),  # a quarter of the way down: (1 + cos 45°) / 2
        (8, 0.6),  # halfway: (lr + min_lr) / 2
        (12, 0.2),  # the last update
        (13, 0.2),  # after the end
    ],
)
def test_cosine_stage_of_twelve_updates(update: int, rate: float) -> None:
    assert learning_rate(COSINE, update, updates=12) == pytest.approx(rate, rel=1e-12)


def test_constant_stage_stays_at_peak() -> None:
    config = OptimConfig(lr=0.5, warmup_steps=2, schedule="constant")
    rates = [learning_rate(config, update, updates=5) for update in range(1, 6)]
    assert rates == [0.25, 0.5, 0.5, 0.5, 0.5]


def test_stage_without_warmup_starts_below_peak() -> None:
    config = OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=0)
    assert learning_rate(config, 1, updates=2) == pytest.approx(0.5)
    assert learning_rate(config, 2, updates=2) == pytest.approx(0.0)


def test_cosine_can_end_before_its_stage() -> None:
    config = OptimConfig(lr=1.0, min_lr=0.2, warmup_steps=4, decay_steps=12)
    for update in range(1, 13):
        assert learning_rate(config, update, updates=100) == learning_rate(COSINE, update, 12)
    assert learning_rate(config, 50, updates=100) == pytest.approx(0.2)


@pytest.mark.parametrize("schedule", PUBLISHED, ids=lambda s: f"{s['train_iters']}")
def test_neox_cosine_matches_every_published_point(schedule: dict[str, Any]) -> None:
    config = OptimConfig(
        lr=schedule["lr"],
        min_lr=schedule["min_lr"],
        warmup_steps=schedule["warmup_iter"],
        schedule="neox_cosine",
    )
    assert len(schedule["points"]) == 202
    for done, rate in schedule["points"]:  # also after the end, where the cosine rises again
        found = learning_rate(config, done + 1, schedule["lr_decay_iters"])
        assert found == pytest.approx(rate, rel=1e-12, abs=0)


def test_neox_cosine_warmup_can_end_between_updates() -> None:
    config = OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=1.5, schedule="neox_cosine")
    rates = [learning_rate(config, update, updates=6) for update in (1, 2, 3)]
    # 0 and 1 updates done: 0 / 1.5 and 1 / 1.5; then 0.5 of 4.5 updates down: (1 + cos 20°) / 2
    assert rates == pytest.approx([0.0, 2 / 3, (1 + 0.9396926207859084) / 2], rel=1e-12)


def rates(config: OptimConfig, updates: int) -> list[float]:
    """Return the learning rates of all updates of a stage."""
    return [learning_rate(config, update, updates) for update in range(1, updates + 1)]


def test_wsd_decays_linearly_over_its_last_updates() -> None:
    config = OptimConfig(lr=1.0, min_lr=0.2, warmup_steps=2, schedule="wsd", decay_share=0.4)
    # 4 of 10 updates decay, by a quarter of 0.8 each; the last one is at min_lr.
    expected = [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]
    assert rates(config, 10) == pytest.approx(expected, rel=1e-12)
    assert learning_rate(config, 10, 10) == 0.2
    assert learning_rate(config, 11, 10) == 0.2  # after the end


def test_wsd_decay_can_start_between_updates() -> None:
    config = OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=0, schedule="wsd", decay_share=0.25)
    # The decay starts after 4.5 of 6 updates: the fifth is at 0.5 / 1.5 of it.
    assert rates(config, 6) == pytest.approx([1.0, 1.0, 1.0, 1.0, 2 / 3, 0.0], rel=1e-12)


def test_wsd_decay_starts_after_the_warmup() -> None:
    config = OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=3, schedule="wsd", decay_share=0.8)
    # The decay would start after the first of 5 updates; it gets only the last 2.
    assert rates(config, 5) == pytest.approx([1 / 3, 2 / 3, 1.0, 0.5, 0.0], rel=1e-12)


def test_wsd_does_not_decay_if_warmup_is_longer() -> None:
    config = OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=4, schedule="wsd")
    assert rates(config, 2) == [0.25, 0.5]


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd", "neox_cosine"])
@pytest.mark.parametrize("enter", ["peak", "continue"])
def test_stage_without_rewarm_has_no_warmup(enter: str, schedule: str) -> None:
    without = OptimConfig(lr=1.0, min_lr=0.2, warmup_steps=0, schedule=schedule)
    config = OptimConfig(lr=1.0, min_lr=0.2, warmup_steps=4, schedule=schedule, enter=enter)
    assert rates(config, 8) == rates(without, 8)
