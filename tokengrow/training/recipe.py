"""Resolution of a recipe: from the composed values of run.yaml to a TrainConfig."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tokengrow.checkpoint.schema import RecordedRun, TokensFrom
from tokengrow.checkpoint.store import Checkpoint, load_source
from tokengrow.data.open_tokens import TokensRequest, checkpoint_tokenizer
from tokengrow.errors import UserError
from tokengrow.growth.config import GrowthConfig
from tokengrow.model.config import LanguageModelConfig
from tokengrow.optim.config import OptimConfig
from tokengrow.optim.schedule import learning_rate
from tokengrow.parsing import drop_nulls, merge_mappings, parse_dataclass
from tokengrow.training.config import StageConfig, TrainConfig
from tokengrow.training.model_section import resolve_growth, resolve_model
from tokengrow.training.plateau import PlateauConfig

Values = dict[str, Any]

INHERITED = ("seed", "batch_size", "micro_batch_size", "validation_every", "validation_sequences")
"""Keys of run.yaml that, if null, take the value of the source's run; so do those of optim."""

DURATIONS = ("steps", "tokens", "flops")
"""Keys of a stage that set its length. A stage has exactly one of them."""


@dataclass(frozen=True, kw_only=True)
class StageSection:
    """One entry of `stages` in a recipe."""

    steps: int | None = None
    """Optimizer updates."""
    tokens: float | None = None
    """Tokens to train on in the stage; rounded up to a whole number of updates."""
    flops: float | None = None
    """FLOPs to spend in the stage, as `ModelConfig.flops_per_token` counts; rounded up too."""
    plateau: PlateauConfig | None = None
    """Rule that ends the stage early."""
    model: dict[str, Any] = field(default_factory=dict)
    """Sizes that differ from the previous stage."""
    optim: dict[str, Any] = field(default_factory=dict)
    """Settings that differ from those of the recipe."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Keys of run.yaml that are resolved into the stages of a TrainConfig."""

    name: str
    """Name of the run; `out` is derived from it."""
    stages: dict[str, Any]
    """Name to StageSection, smallest first; null: the stage is left out."""
    model: dict[str, Any]
    """Sizes of the first stage."""
    batch_size: int
    """Sequences per update."""
    optim: dict[str, Any]
    """Settings of every stage."""
    flops: float | None = None
    """FLOPs of the complete run; a last stage without a length gets what the others leave."""
    max_steps_per_stage: int | None
    """Maximum steps of every stage."""
    prompt: str
    """Prompt of the sample text at the end of the run."""


def resolve_train(values: Values) -> TrainConfig:
    """Return the run that the composed values of run.yaml describe.

    Args:
        values: plain values; null takes the value of the source's run, where there is one.

    Raises:
        UserError: a key is unknown, missing or invalid, or the source cannot be loaded.
    """
    source = None
    if values["source"] is not None:
        source = load_source(str(values["source"]), tensors=False)
        path = str(Path(values["source"]).resolve())
        values = {**inherit_from_source(values, source.run), "source": path}
    keys = {item.name for item in fields(Recipe)}
    recipe = parse_dataclass(Recipe, {key: values[key] for key in keys if key in values})
    growth = parse_dataclass(GrowthConfig, values["growth"], "growth")
    origin = {item.name: values[item.name] for item in fields(TokensFrom)}
    resolved = {
        "growth": growth,
        "batch_size": recipe.batch_size,
        "stages": _resolve_stages(recipe, source, growth),
        "tokens_from": parse_dataclass(TokensFrom, origin),
    }
    rest = {key: value for key, value in values.items() if key not in {*keys, *origin}}
    return parse_dataclass(TrainConfig, {**rest, **resolved})


def tokens_request(config: TrainConfig) -> TokensRequest:
    """Return the tokens that a run needs.

    Raises:
        UserError: the tokens depend on the tokenizer of the source, which has none.
    """
    origin = config.tokens_from or TokensFrom({}, {}, None)
    tokenizer = None
    if config.source and not origin.store and origin.tokenizer.get("file") is None:
        tokenizer = checkpoint_tokenizer(load_source(config.source, tensors=False))
    return TokensRequest(
        origin=origin,
        vocab_size=config.min_vocab_size,
        tokenizer=tokenizer,
        context_length=max(stage.model.context_length for stage in config.stages),
        samples=config.batch_size * sum(stage.steps for stage in config.stages),
        seed=config.seed,
    )


def inherit_from_source(values: Values, recorded: RecordedRun | None) -> Values:
    """Replace null by the value of the source's run.

    Args:
        values: the composed values of run.yaml.
        recorded: run of the source; None: no run wrote it, and null takes the default.
    """
    inherited: Values = {item.name: item.default for item in fields(TrainConfig)}
    if recorded is not None:
        inherited |= recorded.to_dict()
    inherited = {key: inherited[key] for key in INHERITED}
    stages = list(recorded.stages.values()) if recorded else []
    optim = dict(stages[-1].optim) if stages else asdict(OptimConfig())
    # These two describe the length and the start of that stage, not of a new one.
    inherited["optim"] = optim | {"decay_steps": None, "enter": "rewarm"}
    if recorded and recorded.tokens_from and values["data"].get("source") is None:
        inherited |= asdict(recorded.tokens_from)
    return {**values, **merge_mappings(inherited, values)}


def _resolve_stages(
    recipe: Recipe, source: Checkpoint | None, growth: GrowthConfig
) -> tuple[StageConfig, ...]:
    """Return the stages with their models, lengths and optimizer settings.

    Args:
        recipe: stages, and the model and optim sections that they change.
        source: checkpoint that the ladder starts from.
        growth: settings of the growths between stages.
    """
    resolved: list[StageConfig] = []
    previous = source.config if source else None
    parse_dataclass(OptimConfig, recipe.optim, "optim")  # so that errors name optim, not a stage
    sections = {
        name: parse_dataclass(StageSection, section, f"stages.{name}")
        for name, section in recipe.stages.items()
        if section is not None
    }
    if (remaining := recipe.flops) is not None:
        _check_positive(remaining, "flops")
    for name, section in sections.items():
        where = f"stages.{name}"
        changes = section.model if resolved else merge_mappings(recipe.model, section.model)
        where_model = f"{where}.model" if resolved else "model"
        if previous is None:
            target = resolve_model(changes, where=where_model)
        else:
            target = resolve_growth(changes, previous, where_model, growth).final_target
        if is_last := len(resolved) == len(sections) - 1:
            section = _with_remaining_flops(section, remaining, where)
        steps = _stage_steps(section, target, recipe.batch_size, where)
        if remaining is not None:
            per_update = recipe.batch_size * target.context_length
            remaining -= steps * per_update * target.flops_per_token()
        settings = dict(recipe.optim)
        if settings.get("schedule") == "wsd" and not is_last:
            settings["schedule"] = "constant"  # the next stage grows before the decay
        if not resolved:
            _check_can_grow(sections, target)
        before = resolved[-1] if resolved else source
        resolved.append(
            StageConfig(
                name=name,
                steps=min(steps, recipe.max_steps_per_stage or steps),
                model=target,
                optim=_stage_optim(settings, section.optim, before, f"{where}.optim"),
                plateau=section.plateau,
            )
        )
        previous = target
    return tuple(resolved)


def _with_remaining_flops(
    section: StageSection, remaining: float | None, where: str
) -> StageSection:
    """Give the last stage the FLOPs that the stages before it leave.

    Args:
        section: the last stage.
        remaining: FLOPs left of the run's; None: the run has no budget in FLOPs.
        where: name of the stage, for error messages.

    Raises:
        UserError: the stage has a length too, or nothing is left for it.
    """
    if remaining is None:
        return section
    for key in DURATIONS:
        if (value := getattr(section, key)) is not None:
            raise UserError(
                f"{where}.{key} must be null with flops, got {value:g}: the last stage gets the "
                f"FLOPs that the others leave. Set {where}.{key}=null or flops=null."
            )
    if remaining <= 0:
        raise UserError(
            f"flops leaves nothing for {where}: the stages before it need {-remaining:.3g} more. "
            "Raise flops, or shorten those stages."
        )
    return replace(section, flops=remaining)


def _check_can_grow(sections: Mapping[str, StageSection], first: LanguageModelConfig) -> None:
    """Raise `UserError` with the names of all stages that change a model that cannot grow."""
    later = list(sections.items())[1:]
    names = [name for name, section in later if drop_nulls(section.model)]
    if names and not first.can_grow:
        removals = " ".join(f"'~stages.{name}'" for name in names)
        raise UserError(
            f"stages {', '.join(names)} change the model, but a {first.architecture} cannot grow. "
            f"Remove them ({removals}), and train each size in a run of its own."
        )


def _check_positive(amount: float, key: str) -> None:
    """Raise `UserError` unless an amount of tokens or FLOPs is positive and finite."""
    if not 0 < amount < math.inf:
        raise UserError(f"{key} must be a positive number, got {amount:g}.")


def _stage_steps(
    section: StageSection, model: LanguageModelConfig, batch_size: int, where: str
) -> int:
    """Return the updates of a stage; tokens and FLOPs are rounded up.

    Args:
        section: the stage, with one of steps, tokens and flops.
        model: its model.
        batch_size: sequences per update.
        where: name of the stage, for error messages.
    """
    given = {key: value for key in DURATIONS if (value := getattr(section, key)) is not None}
    if not given:
        raise UserError(f"{where}.steps is missing. Set it, or {where}.tokens or {where}.flops.")
    if len(given) > 1:
        nulls = " or ".join(f"{where}.{key}=null" for key in given)
        raise UserError(
            f"{where} must have one of {', '.join(DURATIONS)}, got {' and '.join(given)}. Set the "
            f"others to null ({nulls})."
        )
    if section.steps is not None:
        return section.steps
    ((key, amount),) = given.items()
    _check_positive(amount, f"{where}.{key}")
    per_update = max(batch_size, 1) * model.context_length  # TrainConfig rejects a smaller one
    if key == "flops":
        per_update *= model.flops_per_token()
    return math.ceil(amount / per_update)


def _stage_optim(
    settings: Values, changes: Values, before: StageConfig | Checkpoint | None, where: str
) -> OptimConfig:
    """Return the optimizer settings of a stage.

    Args:
        settings: those of the recipe.
        changes: those of the stage. `enter: continue` takes the final rate of `before`.
        before: previous stage; for the first one, the checkpoint that the ladder starts from.
        where: name of the section, for error messages.
    """
    optim = parse_dataclass(OptimConfig, {**settings, **changes}, where)
    if optim.enter != "continue":
        return optim
    if "lr" in changes:
        raise UserError(
            f"{where}.lr must be null with enter: continue, got {changes['lr']}: the stage takes "
            "the final learning rate of the previous one. Remove it, or set enter: rewarm or peak."
        )
    rate = _final_rate(before) if isinstance(before, Checkpoint) else None
    if isinstance(before, StageConfig):
        rate = learning_rate(before.optim, before.steps, before.steps)
    if rate is None:
        raise UserError(
            f"{where}.enter must be rewarm or peak, got 'continue': there is no previous stage, "
            "and no source= that a run wrote."
        )
    if rate == 0:
        raise UserError(
            f"{where}.enter must be rewarm or peak, got 'continue': the previous stage ended at a "
            "learning rate of 0. Or end that stage at a min_lr above 0."
        )
    # A min_lr above the rate would turn a decay into a rise.
    return replace(optim, lr=rate, min_lr=min(optim.min_lr, rate))


def _final_rate(source: Checkpoint) -> float | None:
    """Return the learning rate at a checkpoint of a run; None: no run wrote it."""
    if source.run is None or not source.run.stages:
        return None
    stages = list(source.run.stages.values())
    stage, done = stages[-1], stages[-1].steps
    # A checkpoint that `tokengrow grow` wrote is in no stage: the end of the last one counts.
    if source.train_state and source.train_state.in_run:
        stage, done = stages[source.train_state.stage], source.train_state.stage_step
    return learning_rate(parse_dataclass(OptimConfig, stage.optim, "optim"), done, stage.steps)
