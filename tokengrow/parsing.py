"""Plain mappings (from YAML or a checkpoint) into typed dataclasses, once, at the door.

Everything below the command line takes typed objects. An unknown key is an error that names the key
and its nearest valid neighbour; nothing is ever instantiated from a name in a file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass, make_dataclass
from difflib import get_close_matches
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tokengrow.errors import UserError

T = TypeVar("T")

MISSING_VALUE = "???"
"""How YAML marks a value that the user has to give."""

NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
"""Types of scalars as a user knows them."""


def parse_dataclass(cls: type[T], values: Any, where: str = "") -> T:
    """Builds the dataclass `cls` from a plain mapping, nested dataclasses included.

    Args:
        cls: a dataclass whose fields are scalars, lists, tuples, mappings or dataclasses.
        values: the mapping; a key that is absent takes the field's default, and a dataclass object
            is taken as it is.
        where: dotted prefix of the keys in error messages, for example `"model"`.

    Raises:
        UserError: an unknown, missing or ill-typed key, or a value that the class itself refuses.
    """
    hints = get_type_hints(cls)
    check_keys(values, list(hints), where)
    arguments: dict[str, Any] = {}
    for field in fields(cls):  # type: ignore[arg-type]
        key = join_key(where, field.name)
        if field.name in values and values[field.name] != MISSING_VALUE:
            arguments[field.name] = _convert(values[field.name], hints[field.name], key)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"{key} is missing: it has no default, so give it a value ({key}=...)")
    return cls(**arguments)


def check_keys(values: Any, valid: Sequence[str], where: str) -> None:
    """Refuses what is no mapping, and a key that is not among the valid ones."""
    if not isinstance(values, Mapping):
        raise UserError(f"{where} must be a mapping of {', '.join(valid)}, not {values!r}")
    for key in values:
        if key not in valid:
            raise UserError(f"unknown key {join_key(where, str(key))}{nearest(str(key), valid)}")


def nearest(word: str, valid: Sequence[str]) -> str:
    """The end of a sentence about a wrong word: the valid word nearest to it, or all of them."""
    if near := get_close_matches(word, valid, n=1, cutoff=0.5):
        return f": did you mean {near[0]!r}?"
    return f": valid are {', '.join(valid)}"


def join_key(where: str, key: str) -> str:
    """The dotted name of a key inside its section."""
    return f"{where}.{key}" if where else key


def _convert(value: Any, hint: Any, key: str) -> Any:
    """One value as its field's type wants it."""
    kind, items = get_origin(hint), get_args(hint)
    if optional := [item for item in items if is_dataclass(item) and type(None) in items]:
        return None if value is None else _convert(value, optional[0], key)
    if is_dataclass(hint):
        return value if isinstance(value, hint) else parse_dataclass(hint, value, key)  # type: ignore[arg-type]
    if kind is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{key} must be a mapping, not {value!r}")
        return dict(value)
    if kind in (list, tuple):
        if not isinstance(value, list | tuple):
            way = f": write {key}=[{value}]" if isinstance(value, str | int | float) else ""
            raise UserError(f"{key} must be a list, not {value!r}{way}")
        if kind is tuple and items[-1] is not Ellipsis and len(value) != len(items):
            raise UserError(f"{key} must have {len(items)} values, not {len(value)}: {value!r}")
        each = items if kind is tuple and items[-1] is not Ellipsis else [items[0]] * len(value)
        converted = [
            _convert(v, h, f"{key}[{i}]") for i, (v, h) in enumerate(zip(value, each, strict=True))
        ]
        return tuple(converted) if kind is tuple else converted
    return _scalar(value, hint, key)


def _scalar(value: Any, hint: Any, key: str) -> Any:
    """Checks and converts a scalar by OmegaConf's rules."""
    if value is None and type(None) not in get_args(hint):
        raise UserError(f"{key} cannot be null: give it a value ({key}=...)")
    if isinstance(value, str) and hint in (str, str | None):
        return value  # not through OmegaConf, which would read ${ as the start of a reference
    node = OmegaConf.structured(make_dataclass("Scalar", [("value", hint)]))
    try:
        node.value = value
        return OmegaConf.to_container(node)["value"]  # type: ignore[call-overload, index]
    except OmegaConfBaseException as error:
        kinds = [name for kind, name in NAMES.items() if kind in (hint, *get_args(hint))]
        if not kinds:
            raise UserError(f"{key}: {str(error).splitlines()[0]}") from None
        raise UserError(f"{key} must be {' or '.join(kinds)}, not {value!r}") from None
