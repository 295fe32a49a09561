"""What a growth will do, as data: source, target and the ordered steps between them.

A new axis is a line in `AXES`, an operator in `tokengrow.growth.engine.OPERATORS` and one in
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
"""Growth axis to the config fields that it changes, in the order in which axes are grown."""

KEPT = ("tau", "rotary_channels", "rotary_base", "norm_eps", "final_norm_eps", "init")
"""Part of the function, or of its history, and not of its size: the grown model keeps the source's,
whatever is requested (but for the epsilons of a wider one, which shrink with the variance that they
are added to, and a tau that `growth.tau` does not keep)."""


DEFAULT = GrowthConfig()


@dataclass(frozen=True)
class Step:
    """The growth along one axis."""

    axis: str
    """A key of `AXES`."""
    source: ModelConfig
    """The model before this step."""
    target: ModelConfig
    """The model after this step."""

    @property
    def changes(self) -> dict[str, tuple[int | float, int | float]]:
        """Dotted config key to (before, after)."""
        return self.source.differences(self.target)


@dataclass(frozen=True)
class GrowthPlan:
    """Source config, target config, and the ordered steps between them."""

    source: ModelConfig
    """The model at hand."""
    target: ModelConfig
    """The model right after the growth."""
    steps: tuple[Step, ...]
    """From one to the other."""
    settled: ModelConfig
    """The target once training has moved tau to where it ends: another one if tau is annealed."""
    config: GrowthConfig
    """How new parameters are born, and how exact the growth must be."""


def plan_growth(
    source: LanguageModelConfig,
    requested: LanguageModelConfig,
    where: str = "model",
    config: GrowthConfig = DEFAULT,
) -> GrowthPlan:
    """The steps from one size to another.

    Args:
        source: the model at hand.
        requested: the sizes wanted. What is not a size (`KEPT`) is taken from the source: a tau
            recomputed from the new number of tokens would rescale every score.
        where: the section that asked for it, in error messages.
        config: what new parameters are, and what becomes of tau.

    Returns:
        The plan; its target is the requested sizes with the source's `KEPT` fields.

    Raises:
        UserError: a target that is smaller somewhere, or differs in a key that growth cannot
            change, or that `config` has no growth for; any other than the source, of what does not
            grow.
    """
    if not isinstance(source, ModelConfig) or not isinstance(requested, ModelConfig):
        return _plan_to_stay(source, requested, where, config)
    grows = {name for names in AXES.values() for name in names}
    for key, (before, after) in source.differences(requested).items():
        field = key.partition(".")[0]
        if field in KEPT:
            continue
        if field not in grows:
            raise UserError(
                f"{where}.{key}: {before} -> {after}: growth cannot change it (it grows "
                f"{', '.join(AXES)}); set {where}.{key}={before}"
            )
        if after < before:
            back = ", or take tokens away with `tokengrow prune`" if field == "tokens" else ""
            raise UserError(
                f"{where}.{key}: {before} -> {after}: growth never makes a model smaller; "
                f"set it to at least {before}{back}"
            )
    steps: list[Step] = []
    before = source
    for axis, names in AXES.items():
        changes: dict[str, Any] = {name: getattr(requested, name) for name in names}
        if axis == "width":
            changes |= rescaled_eps(before, requested.width)
        if axis == "tokens" and config.tau == "recompute" and before.tokens != requested.tokens:
            changes["tau"] = _recomputed(before, requested)
        after = replace(before, **changes)
        if after != before:
            steps.append(Step(axis, before, after))
        before = after
    _check_init(steps, config)
    settled = replace(before, tau=Taus()) if config.tau == "anneal" else before
    return GrowthPlan(source, before, tuple(steps), settled, config)


def moving_tau(
    source: LanguageModelConfig, settled: LanguageModelConfig, config: GrowthConfig
) -> Taus | None:
    """The tau from which a stage anneals it to that of its own model; None: it stays.

    Args:
        source: the model that the stage starts with.
        settled: the model of the stage.
        config: whether tau is annealed.
    """
    if config.tau != "anneal" or source == settled or not isinstance(source, ModelConfig):
        return None
    return source.tau


def _plan_to_stay(
    source: LanguageModelConfig, requested: LanguageModelConfig, where: str, config: GrowthConfig
) -> GrowthPlan:
    """The plan without steps of a model that does not grow, if it is to stay what it is."""
    if source.architecture != requested.architecture:
        raise UserError(
            f"{where}.architecture: {source.architecture} -> {requested.architecture}: growth "
            f"cannot change it; train a {requested.architecture} from scratch, as a run of its own"
        )
    if source != requested:
        raise UserError(does_not_grow(source, where))
    same = cast(ModelConfig, source)  # of a plan without steps nobody asks for more than its size
    return GrowthPlan(same, same, (), same, config)


def does_not_grow(source: LanguageModelConfig, where: str) -> str:
    """The sentence about a section that asks for another size of what does not grow."""
    return (
        f"{where} changes the model, and a {source.architecture} does not grow: leave it as it is, "
        "or train the other size from scratch, as a run of its own"
    )


def _recomputed(source: ModelConfig, requested: ModelConfig) -> Taus:
    """sqrt(N) of each role that grows; the others have no reason to be another function."""
    grows = [role for role, n in source.tokens.items() if getattr(requested.tokens, role) > n]
    return replace(source.tau, **dict.fromkeys(grows, 0.0))


def _check_init(steps: list[Step], config: GrowthConfig) -> None:
    """Refuses axes and sizes that the wanted kind of new parameters cannot grow to."""
    others = [step.axis for step in steps if step.axis != "tokens"]
    if config.init == "published" and others:
        raise UserError(
            f"growth.init=published grows parameter tokens alone, as the published code does, "
            f"and not {', '.join(others)}: take growth=zero_key"
        )
    if config.init == "gram":
        for step in steps:
            if step.axis == "tokens":
                check_gram(step.source, step.target)
