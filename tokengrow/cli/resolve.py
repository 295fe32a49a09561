"""The composed YAML into typed objects, once: everything below takes these."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tokengrow.checkpoint.store import Checkpoint
from tokengrow.cli.resolve_model import overlay, resolve_growth, resolve_model, without_nulls
from tokengrow.cli.source import load_source
from tokengrow.data.corpus import CORPORA, Corpus
from tokengrow.data.megatron_source import MegatronConfig
from tokengrow.data.tokenizer import TokenizerConfig
from tokengrow.errors import UserError
from tokengrow.growth.config import GrowthConfig
from tokengrow.model.config import LanguageModelConfig
from tokengrow.optim.config import OptimConfig
from tokengrow.optim.schedule import learning_rate
from tokengrow.parsing import parse_dataclass
from tokengrow.training.config import StageConfig, TrainConfig
from tokengrow.training.plateau import PlateauConfig

Values = dict[str, Any]

MEGATRON = "megatron"
"""The one `data.source` that is no text."""

MIXTURE = "mixture"
"""The one `data.source` that is made of others."""

INHERITED = ("seed", "batch_size", "micro_batch_size", "validation_every", "validation_sequences")
"""Keys of run.yaml that, when null, are as in the source's run; so are those of optim."""

TOKENS_FROM = ("data", "tokenizer", "store")
"""Keys of run.yaml that say where tokens come from; with `data=same`, as in the source's run."""


LENGTHS = ("steps", "tokens", "flops")
"""Keys of a stage that say how long it is, of which it has one."""


@dataclass(frozen=True, kw_only=True)
class StageEntry:
    """A stage as a recipe writes it."""

    steps: int | None = None
    """Optimizer updates."""
    tokens: float | None = None
    """Trained on in the stage; rounded up to whole updates."""
    flops: float | None = None
    """Spent in the stage, as `ModelConfig.flops_per_token` counts; rounded up likewise."""
    plateau: PlateauConfig | None = None
    """When it ends before that."""
    model: dict[str, Any] = field(default_factory=dict)
    """Sizes that differ from the stage before."""
    optim: dict[str, Any] = field(default_factory=dict)
    """Settings that differ from the recipe's."""


def plain(config: DictConfig) -> Values:
    """The composed config as plain values, interpolations resolved."""
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The keys of run.yaml of which a TrainConfig is made, or that only the verb needs."""

    name: str
    """Of the run; `out` is made of it."""
    source: str | None
    """Checkpoint or run from which the first stage starts."""
    stages: dict[str, Any]
    """Name to StageEntry, smallest first; null: no such stage."""
    model: dict[str, Any]
    """Sizes of the first stage."""
    optim: dict[str, Any]
    """Settings of every stage."""
    batch_size: int
    """Sequences in an update."""
    flops: float | None = None
    """Of the whole run; the last stage, if it has no length, gets what the others leave."""
    max_steps_per_stage: int | None
    """Cap on every stage's steps."""
    store: str | None
    """Token store to train on; null: made from `data` and `tokenizer`."""
    data: dict[str, Any]
    """The text source; its keys depend on `data.source`."""
    tokenizer: dict[str, Any]
    """Which tokenizer to use."""
    prompt: str
    """Of the sample at the end."""


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """What run.yaml says."""

    run: TrainConfig
    """Stages, data order, where it writes."""
    recipe: Recipe
    """What the verb needs around it."""


def resolve_train(values: Values) -> TrainArguments:
    """The run that a composed run.yaml describes.

    Each stage's model is the one before with the stage's changes; the first one's is that of
    `source`, if given, with the changes of `model`.
    """
    source = None
    if values["source"] is not None:
        source = load_source(str(values["source"]), tensors=False)
        values = {**inherit(values, source.run), "source": str(Path(values["source"]).resolve())}
    names = {item.name for item in fields(Recipe)}
    recipe = parse_dataclass(Recipe, {key: value for key, value in values.items() if key in names})
    rest = {key: value for key, value in values.items() if key not in names}
    growth = parse_dataclass(GrowthConfig, values["growth"], "growth")
    made = {
        "growth": growth,
        "source": recipe.source,
        "batch_size": recipe.batch_size,
        "stages": resolve_stages(recipe, source, growth),
        "tokens_from": {key: values[key] for key in TOKENS_FROM},
    }
    return TrainArguments(run=parse_dataclass(TrainConfig, {**rest, **made}), recipe=recipe)


def inherit(values: Values, recorded: Mapping[str, Any]) -> Values:
    """A run's values with null replaced by what the source's run had.

    Args:
        values: the composed run.yaml.
        recorded: the `run` of the source's checkpoint; empty if no run made it, and then null
            stands for the defaults.
    """
    default = {item.name: item.default for item in fields(TrainConfig)}
    below = {key: recorded.get(key, default[key]) for key in INHERITED}
    stages = list(recorded.get("stages", {}).values())
    settings = stages[-1]["optim"] if stages else asdict(OptimConfig())
    # The length of that stage and how it began, not this one's.
    below["optim"] = settings | {"decay_steps": None, "enter": "rewarm"}
    if recorded and values["data"].get("source") is None:
        below |= recorded["tokens_from"]
    return {**values, **overlay(below, values)}


def resolve_stages(
    recipe: Recipe, source: Checkpoint | None, growth: GrowthConfig
) -> tuple[StageConfig, ...]:
    """The stages of a ladder with their models, lengths and optimizers filled in.

    Args:
        recipe: stages, and the model and optim sections that they change.
        source: the checkpoint that the ladder starts from.
        growth: between each two of them.
    """
    resolved: list[StageConfig] = []
    previous = source.config if source else None
    parse_dataclass(
        OptimConfig, recipe.optim, "optim"
    )  # its mistakes are its own, not the first stage's
    entries = {
        name: parse_dataclass(StageEntry, entry, f"stages.{name}")
        for name, entry in recipe.stages.items()
        if entry is not None
    }
    if (left := recipe.flops) is not None:
        check_amount(left, "flops")
    for name, entry in entries.items():
        where = f"stages.{name}"
        changes = entry.model if resolved else overlay(recipe.model, entry.model)
        where_model = f"{where}.model" if resolved else "model"
        if previous is None:
            target = resolve_model(changes, where=where_model)
        else:
            target = resolve_growth(changes, previous, where_model, growth).settled
        if is_last := len(resolved) == len(entries) - 1:
            entry = with_what_is_left(entry, left, where)
        steps = resolve_steps(entry, target, recipe.batch_size, where)
        if left is not None:
            left -= steps * recipe.batch_size * target.context_length * target.flops_per_token()
        settings = dict(recipe.optim)
        if settings.get("schedule") == "wsd" and not is_last:
            settings["schedule"] = "constant"  # the next stage grows before the decay
        if not resolved:
            _check_grows(entries, target)
        before = resolved[-1] if resolved else source
        resolved.append(
            StageConfig(
                name=name,
                steps=min(steps, recipe.max_steps_per_stage or steps),
                model=target,
                optim=resolve_optim(settings, entry.optim, before, f"{where}.optim"),
                plateau=entry.plateau,
            )
        )
        previous = target
    return tuple(resolved)


def with_what_is_left(entry: StageEntry, left: float | None, where: str) -> StageEntry:
    """The last stage, with the FLOPs that those before it leave of the run's.

    Args:
        entry: the stage; its length is its own unless the run has FLOPs.
        left: of the run's FLOPs; None: the run has none.
        where: the stage's name in error messages.

    Raises:
        UserError: the stage has a length besides, or nothing is left for it.
    """
    if left is None:
        return entry
    for key in LENGTHS:
        if getattr(entry, key) is not None:
            raise UserError(
                f"{where}.{key} and flops cannot both be given: with flops, that of the whole run, "
                f"the last stage gets what is left; set {where}.{key}=null, or flops=null"
            )
    if left <= 0:
        raise UserError(
            f"flops leaves nothing for {where}: the stages before it take {-left:.3g} more; raise "
            "flops, or make them shorter"
        )
    return replace(entry, flops=left)


def _check_grows(stages: Mapping[str, StageEntry], first: LanguageModelConfig) -> None:
    """Refuses stages that would change a model that does not grow, all of them at once."""
    later = list(stages.items())[1:]
    names = [name for name, stage in later if without_nulls(stage.model)]
    if names and not first.grows:
        dropped = " ".join(f"'~stages.{name}'" for name in names)
        raise UserError(
            f"stages {', '.join(names)} change the model, and a {first.architecture} does not "
            f"grow: leave them out ({dropped}), and train each size as a run of its own"
        )


def check_amount(amount: float, key: str) -> None:
    """Refuses tokens or FLOPs of which no number of updates can be made."""
    if not 0 < amount < math.inf:
        raise UserError(f"{key} must be a positive number, not {amount:g}")


def resolve_steps(
    entry: StageEntry, model: LanguageModelConfig, batch_size: int, where: str
) -> int:
    """A stage's updates; tokens and FLOPs are rounded up to whole ones.

    Args:
        entry: the stage, with one of steps, tokens and flops.
        model: that it trains.
        batch_size: sequences in an update.
        where: the stage's name in error messages.
    """
    given = {key: value for key in LENGTHS if (value := getattr(entry, key)) is not None}
    if not given:
        raise UserError(f"{where}.steps is missing: give it, or {where}.tokens or {where}.flops")
    if len(given) > 1:
        raise UserError(
            f"{where} has {' and '.join(given)}, and can have one of them: set the others to null "
            f"({' or '.join(f'{where}.{key}=null' for key in given)})"
        )
    if entry.steps is not None:
        return entry.steps
    ((key, amount),) = given.items()
    check_amount(amount, f"{where}.{key}")
    per_update = max(batch_size, 1) * model.context_length  # TrainConfig refuses a smaller one
    if key == "flops":
        per_update *= model.flops_per_token()
    return math.ceil(amount / per_update)


def resolve_optim(
    settings: Values, changes: Values, before: StageConfig | Checkpoint | None, where: str
) -> OptimConfig:
    """A stage's settings; `enter: continue` gives them the rate at which `before` ended.

    Args:
        settings: those of the recipe.
        changes: the stage's own.
        before: the stage before, for the first one the checkpoint that the ladder starts from.
        where: the stage's section in error messages.
    """
    optim = parse_dataclass(OptimConfig, {**settings, **changes}, where)
    if optim.enter != "continue":
        return optim
    if "lr" in changes:
        raise UserError(
            f"{where}.lr cannot be set with enter: continue, which takes the rate at which the "
            "stage before ended: leave it out, or give enter: rewarm or peak"
        )
    rate = _rate_of_source(before) if isinstance(before, Checkpoint) else None
    if isinstance(before, StageConfig):
        rate = learning_rate(before.optim, before.steps, before.steps)
    if rate is None:
        raise UserError(
            f"{where}.enter cannot be continue: there is no stage before it, nor a source= that a "
            "run made: give rewarm or peak"
        )
    if rate == 0:
        raise UserError(
            f"{where}.enter cannot be continue: what it continues ended at a rate of 0: give "
            "rewarm or peak, or end that at a min_lr above 0"
        )
    # A min_lr above the rate would turn a decay into a rise.
    return replace(optim, lr=rate, min_lr=min(optim.min_lr, rate))


def _rate_of_source(source: Checkpoint) -> float | None:
    """The rate at which a checkpoint's run stood; None where no run made it."""
    stages = list(source.run.get("stages", {}).values())
    if not stages:
        return None
    # What `tokengrow grow` wrote stands in no stage: its run's last one counts, and its end.
    stage = stages[source.train_state.get("stage", -1)]
    done = source.train_state.get("stage_step", stage["steps"])
    return learning_rate(
        parse_dataclass(OptimConfig, stage["optim"], "optim"), done, stage["steps"]
    )


def resolve_corpus(values: Values, where: str = "data") -> Corpus:
    """The text source that the `data` section names, or a part of it."""
    settings = dict(values)
    source = settings.pop("source", None)
    if source is None:
        raise UserError(
            "data says nothing: choose data=NAME or store=DIR, or a source= whose run recorded "
            "its own"
        )
    if source == MEGATRON:
        raise UserError(f"{where}=megatron holds token ids already, not text: train on it as it is")
    if source == MIXTURE and where == "data":
        raise UserError("data=mixture is several texts: give the data= of one of its sources")
    if source not in CORPORA:
        others = [] if where != "data" else [MEGATRON, MIXTURE]
        raise UserError(f"{where}.source {source!r}: valid are {', '.join([*CORPORA, *others])}")
    return parse_dataclass(CORPORA[source], settings, where)


def resolve_megatron(values: Values) -> MegatronConfig | None:
    """The token files that the `data` section names; None where it names a text source."""
    settings = dict(values)
    if settings.pop("source", None) != MEGATRON:
        return None
    return parse_dataclass(MegatronConfig, settings, "data")


def resolve_tokenizer(values: Values, vocab_size: int | None = None) -> TokenizerConfig:
    """The tokenizer of the `tokenizer` section.

    Args:
        values: the section; a null `vocab_size` stands for that of the model.
        vocab_size: the model's; without a model, the default of `TokenizerConfig`.
    """
    given = without_nulls(values)
    if vocab_size is not None:
        given.setdefault("vocab_size", vocab_size)
    return parse_dataclass(TokenizerConfig, given, "tokenizer")
