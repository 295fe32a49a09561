"""Plain mappings into dataclasses: what is converted, and what is refused by name."""

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
            raise UserError(f"inner.width must be at least 1, not {self.width}")


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
    perhaps: Inner | None = None


def outer(**values: Any) -> Outer:
    return parse_dataclass(Outer, {"name": "a", **values}, "outer")


def test_absent_keys_take_their_defaults() -> None:
    assert outer() == Outer(name="a")
    assert outer().files is not outer().files


def test_nested_mappings_become_nested_dataclasses() -> None:
    assert outer(inner={"width": 5}).inner == Inner(width=5, rate=1.0)


def test_a_nested_dataclass_may_be_null() -> None:
    assert outer(perhaps=None).perhaps is None
    assert outer(perhaps={}).perhaps == Inner()
    assert outer(perhaps={"width": 5}).perhaps == Inner(width=5)
    with pytest.raises(UserError, match=r"Unknown key outer\.perhaps\.wdth. Did you mean 'width'"):
        outer(perhaps={"wdth": 5})


def test_what_is_typed_already_is_taken_as_it_is() -> None:
    inner = Inner(width=7)
    assert outer(inner=inner).inner is inner


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"rate": 2}, 2.0),
        ({"rate": "1e-4"}, 1e-4),  # how YAML reads 1e-4: as a string
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
def test_values_are_converted_to_the_type_of_their_field(
    values: dict[str, Any], wanted: Any
) -> None:
    found = getattr(outer(**values), next(iter(values)))
    assert found == wanted
    assert type(found) is type(wanted)


def test_an_unknown_key_is_refused_with_its_nearest_neighbour() -> None:
    with pytest.raises(UserError, match=r"Unknown key outer\.siez. Did you mean 'size'\?"):
        outer(siez=3)
    with pytest.raises(UserError, match=r"Unknown key outer\.inner\.wdth. Did you mean 'width'\?"):
        outer(inner={"wdth": 3})


def test_an_unknown_key_like_no_other_is_refused_with_all_that_are_valid() -> None:
    with pytest.raises(
        UserError, match=r"Unknown key outer\.inner\.zzz\. Valid values: width, rate"
    ):
        outer(inner={"zzz": 3})


@pytest.mark.parametrize("values", [{}, {"name": "???"}])
def test_a_missing_key_is_named(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^outer\.name is missing and has no default"):
        parse_dataclass(Outer, values, "outer")


def test_without_a_section_the_key_stands_alone() -> None:
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
def test_a_value_of_the_wrong_type_is_refused_by_its_dotted_key(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        outer(**values)


@pytest.mark.parametrize("key", ["name", "size", "rate", "flag", "betas", "files"])
def test_null_is_refused_where_it_is_not_optional(key: str) -> None:
    with pytest.raises(
        UserError, match=rf"^outer\.{key} (must not be null|must be a list, got None)"
    ):
        outer(**{key: None})


@pytest.mark.parametrize("betas", [[], [0.9], [0.9, 0.95, 0.99]])
def test_a_tuple_of_another_length_is_refused(betas: list[float]) -> None:
    with pytest.raises(UserError, match=r"^outer\.betas"):
        outer(betas=betas)


def test_a_text_may_hold_any_characters() -> None:
    # A prompt, say; nothing is interpolated here.
    assert outer(name="cost: ${ and {x}").name == "cost: ${ and {x}"


def test_what_the_class_itself_refuses_is_passed_on() -> None:
    with pytest.raises(UserError, match=r"inner\.width must be at least 1, not 0"):
        outer(inner={"width": 0})


def test_the_values_given_are_not_modified() -> None:
    values = {"name": "a", "betas": [0.8, 0.9], "inner": {"width": 2}}
    parse_dataclass(Outer, values)
    assert values == {"name": "a", "betas": [0.8, 0.9], "inner": {"width": 2}}
