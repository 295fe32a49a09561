"""Resolution of a `model` section (of a run, a stage or a command) into a model config."""

from typing import Any

from tokengrow.errors import UserError
from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.plan import (
    DEFAULT_GROWTH,
    INHERITED_FIELDS,
    GrowthPlan,
    no_growth_error,
    plan_growth,
)
from tokengrow.model.architectures import ARCHITECTURE_KEY, read_config
from tokengrow.model.config import LanguageModelConfig, ModelConfig
from tokengrow.parsing import drop_nulls, merge_mappings


def resolve_model(
    changes: dict[str, Any], base: LanguageModelConfig | None = None, where: str = "model"
) -> LanguageModelConfig:
    """Return the sizes of the preset, or of `base`, with the changes applied.

    Args:
        changes: the `model` section, or the part of it in a stage; null means unchanged.
        base: source of a growth.
        where: name of the section, for error messages.

    Raises:
        UserError: there is neither a size nor a preset, or the sizes are invalid.
    """
    changes = dict(changes)
    if preset := changes.pop("preset", None):
        base = ModelConfig.preset(preset)
    given = drop_nulls(changes)
    if base is None and not given:
        raise UserError(f"{where} is empty. Choose model=NAME, or start from source=DIR.")
    if base and given.get(ARCHITECTURE_KEY, base.architecture) != base.architecture:
        base = None  # the sizes of another architecture do not apply
    start: dict[str, Any] = base.to_dict() if base else {}
    if base and given.get("tokens"):
        # The tau of a preset is sqrt(N) of its own N, so it is derived again from the new N. The
        # growth plan keeps the tau of a source.
        start["tau"] = {}
    if base and {"width", "heads"} & given.keys():
        start["head_dim"], start["rotary_channels"] = 0, -1
    return read_config(merge_mappings(start, given), where)


def resolve_growth(
    changes: dict[str, Any],
    source: LanguageModelConfig,
    where: str = "model",
    config: GrowthConfig = DEFAULT_GROWTH,
) -> GrowthPlan:
    """Return the plan of the growth from `source` to the sizes in a `model` section.

    Args:
        changes: the `model` section, or the part of it in a stage; null means unchanged.
        source: config before the growth.
        where: name of the section, for error messages.
        config: growth settings.

    Raises:
        UserError: a key is set that a growth never changes, or the target cannot be reached.
    """
    given, current = drop_nulls(changes), source.to_dict()
    same_architecture = given.get(ARCHITECTURE_KEY, source.architecture) == source.architecture
    changed = any(current.get(key) != value for key, value in given.items())
    if not source.can_grow and same_architecture and changed:
        raise no_growth_error(source, where)
    for key in INHERITED_FIELDS:
        if key in given:
            raise UserError(
                f"{where}.{key} must be null, got {given[key]!r}, because a growth keeps the "
                "value of the source. Remove the key."
            )
    return plan_growth(source, resolve_model(changes, source, where), where, config)
