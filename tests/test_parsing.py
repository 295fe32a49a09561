"""Tests of parsing mappings into dataclasses: conversions, and errors that name the key."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from tokengrow.errors import UserError
from tokengrow.parsing import parse_dataclass


@dataclass(frozen=True)
class Inner:
    width: int = 1
    rate: float = 1.0

    def __post_init__(self) -> None:
        if self.width < 1:
            raise UserError(f"inner.width must be at least 1, got {self.width}.")


@dataclass(frozen=True)
class Outer:
    name: str
    size: int = 3
    rate: float = 0.1
    flag: bool = False
    limit: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    files: list[str] = field(default_factory=list)
    inner: Inner = field(default_factory=Inner)
    optional: Inner | None = None


def parse_outer(**values: Any) -> Outer:
    """Parse `Outer` from these values, with a default name."""
    return parse_dataclass(Outer, {"name": "a", **values}, "outer")


def test_absent_keys_take_defaults() -> None:
    assert parse_outer() == Outer(name="a")
    assert parse_outer().files is not parse_outer().files


def test_nested_mappings_become_nested_dataclasses() -> None:
    assert parse_outer(inner={"width": 5}).inner == Inner(width=5, rate=1.0)


def test_optional_nested_dataclass_may_be_null() -> None:
    assert parse_outer(optional=None).optional is None
    assert parse_outer(optional={}).optional == Inner()
    assert parse_outer(optional={"width": 5}).optional == Inner(width=5)
    with pytest.raises(UserError, match=r"Unknown key outer\.optional\.wdth. Did you mean 'width'"):
        parse_outer(optional={"wdth": 5})


def test_dataclass_instance_is_not_converted() -> None:
    inner = Inner(width=7)
    assert parse_outer(inner=inner).inner is inner


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"rate": 2}, 2.0),
        ({"rate": "1e-4"}, 1e-4),  # YAML reads 1e-4 as a string
        ({"size": "7"}, 7),
        ({"limit": None}, None),
        ({"limit": 3}, 3.0),
        ({"flag": "yes"}, True),
        ({"betas": [0.8, 0.9]}, (0.8, 0.9)),
        ({"betas": [0, 1]}, (0.0, 1.0)),
        ({"files": ["a", "b"]}, ["a", "b"]),
        ({"name": "${not.resolved}"}, "${not.resolved}"),
    ],
)
def test_values_are_converted_to_field_type(values: dict[str, Any], expected: Any) -> None:
    value = getattr(parse_outer(**values), next(iter(values)))
    assert value == expected
    assert type(value) is type(expected)


def test_unknown_key_is_rejected_with_nearest_valid_key() -> None:
    with pytest.raises(UserError, match=r"Unknown key outer\.siez. Did you mean 'size'\?"):
        parse_outer(siez=3)
    with pytest.raises(UserError, match=r"Unknown key outer\.inner\.wdth. Did you mean 'width'\?"):
        parse_outer(inner={"wdth": 3})


def test_unknown_key_without_near_match_lists_valid_keys() -> None:
    with pytest.raises(
        UserError, match=r"Unknown key outer\.inner\.zzz\. Valid values: width, rate"
    ):
        parse_outer(inner={"zzz": 3})


@pytest.mark.parametrize("values", [{}, {"name": "???"}])
def test_missing_key_is_named(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^outer\.name is missing and has no default"):
        parse_dataclass(Outer, values, "outer")


def test_key_without_section_has_no_prefix() -> None:
    with pytest.raises(UserError, match=r"^name is missing"):
        parse_dataclass(Outer, {})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": "x"}, r"^outer\.size must be a whole number, got 'x'\.$"),
        ({"size": 1.5}, r"^outer\.size must be a whole number, got 1\.5\.$"),
        ({"size": True}, r"^outer\.size must be a whole number, got True\.$"),
        ({"rate": "fast"}, r"^outer\.rate must be a number, got 'fast'\.$"),
        ({"limit": "few"}, r"^outer\.limit must be a number, got 'few'\.$"),
        ({"name": [1]}, r"^outer\.name must be text, got \[1\]\.$"),
        ({"flag": "maybe"}, r"^outer\.flag must be true or false, got 'maybe'\.$"),
        (
            {"betas": 0.9},
            r"^outer\.betas must be a list, got 0\.9\. Write outer\.betas=\[0\.9\]\.$",
        ),
        ({"betas": ["x", 0.9]}, r"^outer\.betas\[0\] must be a number, got 'x'\.$"),
        ({"files": "a"}, r"^outer\.files must be a list, got 'a'\. Write outer\.files=\[a\]\.$"),
        ({"inner": {"width": "x"}}, r"^outer\.inner\.width must be a whole number, got 'x'\.$"),
        ({"inner": [1]}, r"^outer\.inner must be a mapping of width, rate, got \[1\]"),
        ({"inner": None}, r"^outer\.inner must be a mapping of width, rate, got None"),
    ],
)
def test_wrong_type_is_rejected_with_dotted_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_outer(**values)


@pytest.mark.parametrize("key", ["name", "size", "rate", "flag", "betas", "files"])
def test_null_is_rejected_unless_optional(key: str) -> None:
    with pytest.raises(
        UserError, match=rf"^outer\.{key} (must not be null|must be a list, got None)"
    ):
        parse_outer(**{key: None})


@pytest.mark.parametrize("betas", [[], [0.9], [0.9, 0.95, 0.99]])
def test_tuple_of_wrong_length_is_rejected(betas: list[float]) -> None:
    with pytest.raises(UserError, match=r"^outer\.betas"):
        parse_outer(betas=betas)


def test_text_may_contain_any_characters() -> None:
    # For example a prompt: values are not interpolated.
    assert parse_outer(name="cost: ${ and {x}").name == "cost: ${ and {x}"


def test_error_of_dataclass_is_propagated() -> None:
    with pytest.raises(UserError, match=r"inner\.width must be at least 1, got 0\."):
        parse_outer(inner={"width": 0})


def test_input_values_are_not_modified() -> None:
    values = {"name": "a", "betas": [0.8, 0.9], "inner": {"width": 2}}
    parse_dataclass(Outer, values)
    assert values == {"name": "a", "betas": [0.8, 0.9], "inner": {"width": 2}}
