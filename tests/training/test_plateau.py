"""Plateau rule, on curves whose end is worked out by hand."""

import math
import random
from typing import Any

import pytest

from tokengrow.errors import UserError
from tokengrow.training.plateau import PlateauConfig, reached_plateau

RULE = PlateauConfig(patience=3, min_delta=0.01)


def ends_after(losses: list[float], rule: PlateauConfig = RULE) -> int | None:
    """Return the number of validations after which a stage ends; None if it does not end."""
    for count in range(1, len(losses) + 1):
        if reached_plateau(losses[:count], rule):
            return count
    return None


def test_an_exponential_fall_ends_where_it_has_become_flat() -> None:
    # 4 + 2^-k falls by 2^-k: up to k = 6 by more than 0.01, at k = 7 by 0.0078, which is not a
    # new best. k = 8 is one: 2^-6 - 2^-8 = 0.0117 below k = 6. The remainder is 0.0039.
    losses = [4 + 2.0**-k for k in range(30)]
    assert ends_after(losses) == 9 + 3  # k = 0 to 8, then three without a new best


def test_flat_curve_ends_after_first_validation_and_patience() -> None:
    assert ends_after([4.0] * 10) == 1 + 3
    assert ends_after([4.0] * 10, PlateauConfig(patience=1)) == 2


def test_slow_fall_continues_while_it_exceeds_min_delta() -> None:
    # 0.004 a validation: the third one is 0.012 below the best, which is more than 0.01.
    assert ends_after([5 - 0.004 * k for k in range(50)]) is None
    # 0.003 a validation: the third one is 0.009 below it.
    assert ends_after([5 - 0.003 * k for k in range(50)]) == 1 + 3


def test_a_gain_of_min_delta_itself_is_none() -> None:
    rule = PlateauConfig(patience=2, min_delta=0.5)  # halves are exact in binary
    assert ends_after([4.0, 3.5, 3.5], rule) == 3
    assert ends_after([4.0, 3.4375, 3.5], rule) is None


def test_bump_at_start_costs_patience_only() -> None:
    # After a growth: 5.0, then two above it, then a fall.
    assert ends_after([5.0, 5.2, 5.1, 4.9, 4.8, 4.7]) is None
    assert ends_after([5.0, 5.2, 5.1, 5.0, 4.8, 4.7]) == 4


def test_a_gain_begins_the_count_anew() -> None:
    assert ends_after([4.0, 4.0, 4.0, 3.9, 3.9, 3.9, 3.9]) == 7


def test_noise_alone_ends_a_stage_and_noise_on_a_fall_does_not() -> None:
    draw = random.Random(0)
    noise = [draw.uniform(-0.004, 0.004) for _ in range(40)]  # below 0.01 between any two
    assert ends_after([4 + jitter for jitter in noise]) == 1 + 3
    assert ends_after([5 - 0.02 * k + jitter for k, jitter in enumerate(noise)]) is None


def test_once_ended_it_stays_ended() -> None:
    assert reached_plateau([4.0, 4.0, 4.0, 4.0, 1.0], RULE)


def test_no_validation_ends_nothing() -> None:
    assert not reached_plateau([], PlateauConfig(patience=1))


def test_a_loss_that_is_no_number_is_no_gain() -> None:
    assert ends_after([4.0, math.nan, math.nan, math.nan]) == 4


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"patience": 0}, "plateau.patience must be at least 1, got 0"),
        ({"min_delta": -0.01}, "plateau.min_delta must be 0 or more, got -0.01"),
        ({"min_delta": math.inf}, "plateau.min_delta"),
    ],
)
def test_a_refused_setting_is_named(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        PlateauConfig(**setting)
