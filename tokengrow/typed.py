"""Plain mappings (from YAML or a checkpoint) into typed dataclasses, once, at the door.

Everything below the command line takes typed objects. An unknown key is an error that names the key
and its nearest valid neighbour; nothing is ever instantiated from a name in a file.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass, make_dataclass
from difflib import get_close_matches
from typing import Any, TypeVar, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tokengrow.errors import UserError

T = TypeVar("T")


def typed(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Builds the dataclass ``cls`` from a plain mapping, nested dataclasses included.

    Args:
        cls: a dataclass whose fields are scalars, lists, tuples or dataclasses.
        values: the mapping; a key that is absent takes the field's default, and a value that is
            typed
            already is taken as it is.
        where: dotted prefix of the keys in error messages, for example ``"model"``.

    Raises:
        UserError: an unknown, missing or ill-typed key, or a value that the class itself refuses.
    """
    hints = get_type_hints(cls)
    check_keys(values, list(hints), where)
    arguments: dict[str, Any] = {}
    for field in fields(cls):  # type: ignore[arg-type]
        key = join_key(where, field.name)
        if field.name not in values:
            if field.default is MISSING and field.default_factory is MISSING:
                raise UserError(f"{key} is missing: it has no default, so give it a value")
            continue
        value, hint = values[field.name], hints[field.name]
        if _is_built(value):
            arguments[field.name] = value
        elif is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise UserError(f"{key} must be a mapping, not {value!r}")
            arguments[field.name] = typed(hint, value, key)  # type: ignore[arg-type]
        else:
            arguments[field.name] = _leaf(value, hint, key)
    return cls(**arguments)


def check_keys(values: Mapping[str, Any], valid: list[str], where: str) -> None:
    """Refuses a key that is not among the valid ones, naming the nearest valid one."""
    for key in values:
        if key not in valid:
            near = get_close_matches(str(key), valid, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid are {', '.join(valid)}"
            raise UserError(f"unknown key {join_key(where, str(key))}: {hint}")


def join_key(where: str, key: str) -> str:
    """The dotted name of a key inside its section."""
    return f"{where}.{key}" if where else key


def _is_built(value: Any) -> bool:
    """Whether a value is typed already: a dataclass object, or a tuple of them."""
    if isinstance(value, tuple):
        return bool(value) and all(_is_built(item) for item in value)
    return is_dataclass(value) and not isinstance(value, type)


def _leaf(value: Any, hint: Any, key: str) -> Any:
    """Checks and converts one value that is not a dataclass, by OmegaConf's own rules."""
    if isinstance(value, str) and value == "???":
        raise UserError(f"{key} is missing: it has no default, so give it a value")
    node = OmegaConf.structured(make_dataclass("Leaf", [("value", hint)]))
    try:
        node.value = value
        converted = OmegaConf.to_container(node)["value"]  # type: ignore[call-overload, index]
    except OmegaConfBaseException as error:
        raise UserError(f"{key}: {str(error).splitlines()[0]}") from None
    return tuple(converted) if get_origin(hint) is tuple else converted
