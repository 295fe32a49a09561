"""A `model` section, of a run, a stage or a verb, into the sizes that it asks for."""

from collections.abc import Mapping
from typing import Any

from tokengrow.errors import UserError
from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.plan import DEFAULT, KEPT, GrowthPlan, does_not_grow, plan_growth
from tokengrow.model.architectures import KEY, read_config
from tokengrow.model.config import LanguageModelConfig, ModelConfig


def resolve_model(
    changes: dict[str, Any], base: LanguageModelConfig | None = None, where: str = "model"
) -> LanguageModelConfig:
    """A model's sizes: those of the preset or of `base`, with what is not null in `changes`.

    Args:
        changes: the `model` section, or a stage's part of it; null means unchanged.
        base: the source of a growth.
        where: the section's name in error messages.
    """
    changes = dict(changes)
    if preset := changes.pop("preset", None):
        base = ModelConfig.preset(preset)
    given = without_nulls(changes)
    if base is None and not given:
        raise UserError(
            f"{where} says nothing: choose model=NAME, or give source=DIR to start from"
        )
    if base and given.get(KEY, base.architecture) != base.architecture:
        base = None  # of another kind there is nothing to take over
    start: dict[str, Any] = base.to_dict() if base else {}
    if base and given.get("tokens"):
        # A preset's tau is sqrt(N) of its own N; of a changed N it is born anew. A source's is
        # kept by the growth plan, whatever stands here.
        start["tau"] = {}
    if base and {"width", "heads"} & given.keys():
        start["head_dim"], start["rotary_channels"] = 0, -1
    return read_config(overlay(start, given), where)


def resolve_growth(
    changes: dict[str, Any],
    source: LanguageModelConfig,
    where: str = "model",
    config: GrowthConfig = DEFAULT,
) -> GrowthPlan:
    """The growth from `source` to what the `model` section, or a stage's part of it, asks for.

    Raises:
        UserError: a key that every growth keeps, and would ignore, or a target out of reach.
    """
    given, there = without_nulls(changes), source.to_dict()
    same_kind = given.get(KEY, source.architecture) == source.architecture
    changed = any(there.get(key) != value for key, value in given.items())
    if not source.grows and same_kind and changed:
        raise UserError(does_not_grow(source, where))
    for key in KEPT:
        if key in given:
            raise UserError(f"{where}.{key} cannot be set here: a growth keeps the source's")
    return plan_growth(source, resolve_model(changes, source, where), where, config)


def without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """The values that say something, in nested mappings too."""
    kept = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            value = without_nulls(dict(value)) or None
        if value is not None:
            kept[key] = value
    return kept


def overlay(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, mappings merged key by key; null above does not count."""
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, Mapping):
            merged[key] = overlay(merged.get(key) or {}, value)
        elif value is not None:
            merged[key] = value
    return merged
