"""Numbers as people read them."""

import pytest

from tokengrow.console.format import (
    bytes_text,
    count,
    exponent,
    folded,
    power,
    three_digits,
)


@pytest.mark.parametrize(
    ("number", "text"),
    [(999, "999"), (1_000, "1k"), (12_345_678, "12.3M"), (2e9, "2B"), (3.14159e12, "3.14T")],
)
def test_a_count_has_three_digits(number: float, text: str) -> None:
    assert count(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(12, "12 B"), (1_500, "1.5 kB"), (9_440_256, "9.4 MB"), (2_000_000_000, "2.0 GB")],
)
def test_bytes_are_in_decimal_units(number: int, text: str) -> None:
    assert bytes_text(number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(3.0725e20, "3.07e20"), (4e14, "4.00e14"), (1_250_000, "1.25e6")]
)
def test_a_power_of_ten_has_three_digits_and_no_plus(number: float, text: str) -> None:
    assert power(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.28661, "0.287"), (63.07, "63.1"), (1234.5, "1,234"), (1.5e-6, "1.5e-06")],
)
def test_small_and_large_quantities_have_three_digits(number: float, text: str) -> None:
    assert three_digits(number) == text


def test_a_small_quantity_has_its_order_and_nothing_is_0() -> None:
    found = [exponent(number) for number in (7.12e-15, 0.0, 0.034, 12.62)]
    assert found == ["7.1e-15", "0", "3.4e-02", "12.6"]


def test_a_long_name_is_folded_and_nothing_of_it_is_left_out() -> None:
    assert folded("lr=0.0003,layers=2", 20) == "lr=0.0003,layers=2"
    assert folded("lr=0.0003,layers=2", 12) == "lr=0.0003,\nlayers=2"
    assert folded("large-scratch", 9) == "large-scr\natch"
    assert folded("a-very-long-word,b", 9) == "a-very-lo\nng-word,b"
