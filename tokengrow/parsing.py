"""Conversion of plain mappings, from YAML or a checkpoint, into typed dataclasses.

Everything below the command line takes typed objects. An unknown key is an error that names the key
and its nearest valid neighbour. Nothing is ever instantiated from a name in a file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass, make_dataclass
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tokengrow.errors import UserError

T = TypeVar("T")

MISSING_VALUE = "???"
"""Marker in YAML for a value that the user must give."""

TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
"""Scalar type to its description in error messages."""


def parse_dataclass(cls: type[T], values: Any, where: str = "") -> T:
    """Build the dataclass `cls`, with nested dataclasses, from a plain mapping.

    Args:
        cls: a dataclass whose fields are scalars, literals, lists, tuples, mappings or dataclasses.
        values: the mapping. A missing key takes the default of its field; a dataclass instance is
            used as it is.
        where: dotted prefix of the keys in error messages, for example `"model"`.

    Raises:
        UserError: a key is unknown or missing, a value has the wrong type, or the class itself
            rejects a value.
    """
    hints = get_type_hints(cls)
    check_keys(values, list(hints), where)
    arguments: dict[str, Any] = {}
    for field in fields(cls):  # type: ignore[arg-type]
        key = join_key(where, field.name)
        if field.name in values and values[field.name] != MISSING_VALUE:
            arguments[field.name] = _convert(values[field.name], hints[field.name], key)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"{key} is missing and has no default. Set {key}=VALUE.")
    return cls(**arguments)


def check_keys(values: Any, valid: Sequence[str], where: str) -> None:
    """Raise `UserError` if `values` is not a mapping, or has a key that is not in `valid`."""
    if not isinstance(values, Mapping):
        raise UserError(f"{where} must be a mapping of {', '.join(valid)}, got {values!r}.")
    for key in values:
        if key not in valid:
            raise UserError(f"Unknown key {join_key(where, str(key))}. {suggest(str(key), valid)}")


def suggest(word: str, valid: Sequence[str]) -> str:
    """Return a sentence with the valid word nearest to an invalid one, or with all of them."""
    if near := get_close_matches(word, valid, n=1, cutoff=0.5):
        return f"Did you mean {near[0]!r}?"
    return f"Valid values: {', '.join(valid)}."


def join_key(where: str, key: str) -> str:
    """Return the dotted name of a key in its section."""
    return f"{where}.{key}" if where else key


def drop_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that are not null, in nested mappings too."""
    kept = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            value = drop_nulls(value) or None
        if value is not None:
            kept[key] = value
    return kept


def merge_mappings(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` updated by `overrides`; nested mappings are merged, null does not override."""
    merged = dict(base)
    for key, value in overrides.items():
        if isinstance(value, Mapping):
            merged[key] = merge_mappings(merged.get(key) or {}, value)
        elif value is not None:
            merged[key] = value
    return merged


def _convert(value: Any, hint: Any, key: str) -> Any:
    """Convert one value to the type of its field."""
    kind, items = get_origin(hint), get_args(hint)
    if optional := [item for item in items if is_dataclass(item) and type(None) in items]:
        return None if value is None else _convert(value, optional[0], key)
    if is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        return parse_dataclass(hint, value, key)  # type: ignore[arg-type]
    if kind is Literal:
        if value not in items:
            raise UserError(f"{key} must be one of {', '.join(map(str, items))}, got {value!r}.")
        return value
    if kind is not None and isinstance(kind, type) and issubclass(kind, Mapping):
        if not isinstance(value, Mapping):
            raise UserError(f"{key} must be a mapping, got {value!r}.")
        return dict(value)
    if kind in (list, tuple):
        return _convert_sequence(value, hint, key)
    return _convert_scalar(value, hint, key)


def _convert_sequence(value: Any, hint: Any, key: str) -> Any:
    """Convert a list, each element to its own type."""
    kind, items = get_origin(hint), get_args(hint)
    if not isinstance(value, list | tuple):
        remedy = f" Write {key}=[{value}]." if isinstance(value, str | int | float) else ""
        raise UserError(f"{key} must be a list, got {value!r}.{remedy}")
    fixed = kind is tuple and items[-1] is not Ellipsis
    if fixed and len(value) != len(items):
        raise UserError(f"{key} must have {len(items)} values, got {len(value)}: {value!r}.")
    types = items if fixed else [items[0]] * len(value)
    converted = [
        _convert(v, h, f"{key}[{i}]") for i, (v, h) in enumerate(zip(value, types, strict=True))
    ]
    return tuple(converted) if kind is tuple else converted


def _convert_scalar(value: Any, hint: Any, key: str) -> Any:
    """Check and convert a scalar by the rules of OmegaConf."""
    if value is None and type(None) not in get_args(hint):
        raise UserError(f"{key} must not be null. Set {key}=VALUE.")
    if isinstance(value, str) and hint in (str, str | None):
        return value  # OmegaConf would read ${ as the start of a reference
    node = OmegaConf.structured(make_dataclass("Scalar", [("value", hint)]))
    try:
        node.value = value
        return OmegaConf.to_container(node)["value"]  # type: ignore[call-overload, index]
    except OmegaConfBaseException as error:
        names = [name for kind, name in TYPE_NAMES.items() if kind in (hint, *get_args(hint))]
        if not names:
            raise UserError(f"{key}: {str(error).splitlines()[0]}") from None
        raise UserError(f"{key} must be {' or '.join(names)}, got {value!r}.") from None
