"""Growth plans as data: source, target and the ordered steps between them.

A new axis needs a line in `AXES`, an operator in `tokengrow.growth.engine.OPERATORS` and one in
`tokengrow.growth.moments.MOMENT_OPERATORS`.
"""

from dataclasses import dataclass, replace
from typing import Any, cast

from tokengrow.errors import UserError
from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.tokens import check_gram
from tokengrow.growth.width import rescaled_eps
from tokengrow.model.config import LanguageModelConfig, ModelConfig, Taus

AXES: dict[str, tuple[str, ...]] = {
    "width": ("width",),
    "heads": ("heads", "head_dim"),
    "tokens": ("tokens",),
    "depth": ("layers",),
}
"""Growth axis to the config fields that it changes, in the order of growth."""

INHERITED_FIELDS = ("tau", "rotary_channels", "rotary_base", "norm_eps", "final_norm_eps", "init")
"""Fields of a model config that describe the function or its history, not its size.

The grown model has those of the source, whatever is requested. There are two exceptions. The
epsilons of a wider model shrink with the variance that they are added to. tau changes if
`growth.tau` is not `keep`."""

DEFAULT_GROWTH = GrowthConfig()


@dataclass(frozen=True)
class GrowthStep:
    """Growth along one axis."""

    axis: str
    """Key of `AXES`."""
    source: ModelConfig
    """Model before this step."""
    target: ModelConfig
    """Model after this step."""

    @property
    def changes(self) -> dict[str, tuple[int | float, int | float]]:
        """Dotted config key to (before, after)."""
        return self.source.differences(self.target)


@dataclass(frozen=True)
class GrowthPlan:
    """Source config, target config, and the ordered steps between them."""

    source: ModelConfig
    """Model before the growth."""
    target: ModelConfig
    """Model directly after the growth."""
    steps: tuple[GrowthStep, ...]
    """Steps from `source` to `target`."""
    final_target: ModelConfig
    """Model after the annealing of tau in training; equals `target` if tau is not annealed."""
    config: GrowthConfig
    """Initialisation of new parameters and drift tolerance."""


def plan_growth(
    source: LanguageModelConfig,
    requested: LanguageModelConfig,
    section: str = "model",
    config: GrowthConfig = DEFAULT_GROWTH,
) -> GrowthPlan:
    """Plan the steps from one size to another.

    Args:
        source: config of the model before the growth.
        requested: requested sizes. `INHERITED_FIELDS` are taken from the source, because a tau
            recomputed from the new number of tokens would rescale every score.
        section: name of the section that requests the sizes, for error messages.
        config: initialisation of new parameters, and rule for tau.

    Returns:
        The plan; its target has the requested sizes and the `INHERITED_FIELDS` of the source.

    Raises:
        UserError: the target is smaller in a size, or differs in a key that growth cannot change,
            or `config` does not support the growth. An architecture that does not grow allows no
            target other than the source.
    """
    if not isinstance(source, ModelConfig) or not isinstance(requested, ModelConfig):
        return _plan_without_growth(source, requested, section, config)
    _check_target(source, requested, section)
    steps: list[GrowthStep] = []
    before = source
    for axis, names in AXES.items():
        changes: dict[str, Any] = {name: getattr(requested, name) for name in names}
        if axis == "width":
            changes |= rescaled_eps(before, requested.width)
        if axis == "tokens" and config.tau == "recompute":
            # A tau of 0 requests sqrt(N). Only roles that grow get it, the others stay exact.
            grown = [r for r, n in before.tokens.items() if getattr(requested.tokens, r) > n]
            changes["tau"] = replace(before.tau, **dict.fromkeys(grown, 0.0))
        after = replace(before, **changes)
        if after != before:
            steps.append(GrowthStep(axis, before, after))
        before = after
    _check_init(steps, config)
    final_target = replace(before, tau=Taus()) if config.tau == "anneal" else before
    return GrowthPlan(source, before, tuple(steps), final_target, config)


def anneal_start_tau(
    source: LanguageModelConfig, target: LanguageModelConfig, config: GrowthConfig
) -> Taus | None:
    """Return the tau from which a stage anneals to that of its own model; None: no annealing.

    Args:
        source: model that the stage starts from.
        target: model of the stage.
        config: rule for tau.
    """
    if config.tau != "anneal" or source == target or not isinstance(source, ModelConfig):
        return None
    return source.tau


def no_growth_error(source: LanguageModelConfig, section: str) -> UserError:
    """Return the error of a section that changes the size of an architecture without growth."""
    return UserError(
        f"{section} must keep the sizes of the source, because a {source.architecture} does not "
        "grow. Remove the change, or train the other size from scratch in a run of its own."
    )


def _plan_without_growth(
    source: LanguageModelConfig, requested: LanguageModelConfig, section: str, config: GrowthConfig
) -> GrowthPlan:
    """Return a plan without steps, or raise `UserError` if anything is to change."""
    if source.architecture != requested.architecture:
        raise UserError(
            f"{section}.architecture must stay {source.architecture}, got "
            f"{requested.architecture}. Growth cannot change it. Train a "
            f"{requested.architecture} from scratch in a run of its own."
        )
    if source != requested:
        raise no_growth_error(source, section)
    same = cast(ModelConfig, source)  # a plan without steps is only read for its sizes
    return GrowthPlan(same, same, (), same, config)


def _check_target(source: ModelConfig, requested: ModelConfig, section: str) -> None:
    """Raise `UserError` if a requested size is smaller, or if growth cannot change a key."""
    grows = {name for names in AXES.values() for name in names}
    for key, (before, after) in source.differences(requested).items():
        field = key.partition(".")[0]
        if field in INHERITED_FIELDS:
            continue
        if field not in grows:
            raise UserError(
                f"{section}.{key} must stay {before}, got {after}. Growth changes only "
                f"{', '.join(AXES)}. Set {section}.{key}={before}."
            )
        if after < before:
            prune = ", or remove tokens with `tokengrow prune`" if field == "tokens" else ""
            raise UserError(
                f"{section}.{key} must be at least {before}, got {after}. Growth never makes a "
                f"model smaller. Set {section}.{key}={before} or more{prune}."
            )


def _check_init(steps: list[GrowthStep], config: GrowthConfig) -> None:
    """Raise `UserError` if `growth.init` does not support the axes and sizes of the steps."""
    others = [step.axis for step in steps if step.axis != "tokens"]
    if config.init == "published" and others:
        raise UserError(
            "growth.init=published must grow only parameter tokens, as the published code does, "
            f"got {', '.join(others)}. Use growth=zero_key."
        )
    if config.init == "gram":
        for step in steps:
            if step.axis == "tokens":
                check_gram(step.source, step.target)
