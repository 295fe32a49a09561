"""Tests of the formatting of numbers, durations and names."""

import pytest

from tokengrow.console.format import (
    fold_name,
    format_bytes,
    format_clock,
    format_count,
    format_duration,
    format_power,
    format_small_number,
    format_three_digits,
)


@pytest.mark.parametrize(
    ("number", "text"),
    [(999, "999"), (1_000, "1k"), (12_345_678, "12.3M"), (2e9, "2B"), (3.14159e12, "3.14T")],
)
def test_count_has_three_digits(number: float, text: str) -> None:
    assert format_count(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(12, "12 B"), (1_500, "1.5 kB"), (9_440_256, "9.4 MB"), (2_000_000_000, "2.0 GB")],
)
def test_bytes_are_in_decimal_units(number: int, text: str) -> None:
    assert format_bytes(number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(3.0725e20, "3.07e20"), (4e14, "4.00e14"), (1_250_000, "1.25e6")]
)
def test_power_of_ten_has_three_digits_and_no_plus_sign(number: float, text: str) -> None:
    assert format_power(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.28661, "0.287"), (63.07, "63.1"), (1234.5, "1,234"), (1.5e-6, "1.5e-06")],
)
def test_small_and_large_quantities_have_three_digits(number: float, text: str) -> None:
    assert format_three_digits(number) == text


def test_tiny_number_has_an_exponent_and_zero_has_none() -> None:
    formatted = [format_small_number(number) for number in (7.12e-15, 0.0, 0.034, 12.62)]
    assert formatted == ["7.1e-15", "0", "3.4e-02", "12.6"]


def test_duration_is_in_seconds_minutes_or_hours() -> None:
    assert [format_duration(s) for s in (41.3, 99.6, 185, 3723, 10_000)] == [
        "41 s", "2 min", "3 min", "62 min", "2 h 47 min",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.9, "0:00:04"), (3666, "1:01:06"), (100_000, "1 day, 3:46:40")]
)
def test_clock_counts_full_seconds(seconds: float, text: str) -> None:
    assert format_clock(seconds) == text


def test_folding_keeps_every_character_of_a_name() -> None:
    assert fold_name("lr=0.0003,layers=2", 20) == "lr=0.0003,layers=2"
    assert fold_name("lr=0.0003,layers=2", 12) == "lr=0.0003,\nlayers=2"
    assert fold_name("large-scratch", 9) == "large-scr\natch"
    assert fold_name("a-very-long-word,b", 9) == "a-very-lo\nng-word,b"
