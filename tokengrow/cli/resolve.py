"""The composed YAML into typed objects, once: everything below takes these."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tokengrow.checkpoint.store import Checkpoint, load_checkpoint
from tokengrow.data.corpus import CORPORA, Corpus
from tokengrow.data.tokenizer import Tokenizer, TokenizerConfig
from tokengrow.distributed.fabric import FabricConfig
from tokengrow.errors import UserError
from tokengrow.growth.engine import GrowthConfig
from tokengrow.growth.plan import KEPT, plan_growth
from tokengrow.model.config import ModelConfig
from tokengrow.training.ladder import StageConfig, TrainConfig
from tokengrow.training.metrics import LoggerConfig
from tokengrow.training.optim import OptimConfig
from tokengrow.typed import check_keys, typed

Values = dict[str, Any]

SECTIONS = {"growth": GrowthConfig, "fabric": FabricConfig, "logger": LoggerConfig}
"""Keys of train.yaml that are dataclasses of their own."""

NOT_OF_THE_RUN = (
    "name",
    "data",
    "tokenizer",
    "store",
    "model",
    "optim",
    "max_steps_per_stage",
    "prompt",
)
"""Keys of train.yaml that are spent on the way to a TrainConfig, or belong to the verb alone."""


def plain(config: DictConfig, *needed: str) -> Values:
    """The composed config as plain values, interpolations resolved.

    Raises:
        UserError: one of the keys that the verb needs has no value.
    """
    for key in needed:
        if OmegaConf.is_missing(config, key):
            raise UserError(f"{key} is missing: it has no default, so give it a value ({key}=...)")
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def resolve_train(values: Values) -> TrainConfig:
    """The run that a composed train.yaml describes.

    Each stage's model is the one before with the stage's changes; the first one's is that of
    `source`, if given, with the changes of `model`.
    """
    source = values["source"]
    base = load_checkpoint(source).config if source else None
    rest = {key: value for key, value in values.items() if key not in NOT_OF_THE_RUN}
    sections: Values = {key: typed(cls, rest.pop(key), key) for key, cls in SECTIONS.items()}
    stages = resolve_stages(
        rest.pop("stages"), values["model"], values["optim"], base, values["max_steps_per_stage"]
    )
    return typed(TrainConfig, {**rest, **sections, "stages": stages})


def resolve_stages(
    stages: Mapping[str, Any],
    model: Values,
    optim: Values,
    source: ModelConfig | None,
    max_steps: int | None,
) -> tuple[StageConfig, ...]:
    """The stages of a ladder with their models and optimizers filled in.

    Args:
        stages: name to `{steps, model, optim}`, the last two being changes.
        model: the `model` section: sizes of the first stage.
        optim: the `optim` section: settings of every stage.
        source: size of the checkpoint that the ladder starts from.
        max_steps: cap on every stage's steps.
    """
    resolved: list[StageConfig] = []
    previous = source
    typed(OptimConfig, optim, "optim")  # its mistakes are its own, not those of the first stage
    for name, stage in stages.items():
        where = f"stages.{name}"
        stage = stage or {}
        check_keys(stage, ["steps", "model", "optim"], where)
        changes = _overlay(model, stage.get("model") or {}) if not resolved else stage.get("model")
        where_model = f"{where}.model" if resolved else "model"
        target = resolve_model(changes or {}, previous, where_model)
        if previous is not None:
            refuse_kept(changes or {}, where_model)
            target = plan_growth(previous, target, where_model).target
        steps = stage.get("steps")
        if isinstance(steps, int) and max_steps is not None:
            steps = min(steps, max_steps)
        settings = typed(OptimConfig, {**optim, **(stage.get("optim") or {})}, f"{where}.optim")
        entry = {"name": name, "model": target, "optim": settings}
        if steps is not None:
            entry["steps"] = steps
        resolved.append(typed(StageConfig, entry, where))
        previous = target
    return tuple(resolved)


def resolve_model(
    changes: Values, base: ModelConfig | None = None, where: str = "model"
) -> ModelConfig:
    """A model's sizes: those of the preset or of `base`, with what is not null in `changes`.

    Args:
        changes: the `model` section, or a stage's part of it; null means unchanged.
        base: the source of a growth.
        where: the section's name in error messages.
    """
    changes = dict(changes)
    if preset := changes.pop("preset", None):
        base = ModelConfig.preset(preset)
    given = _without_nulls(changes)
    start: Values = base.to_dict() if base else {}
    if base and given.get("tokens"):
        # A preset's tau is sqrt(N) of its own N; of a changed N it is born anew. A source's is
        # kept by the growth plan, whatever stands here.
        start["tau"] = {}
    if base and {"width", "heads"} & given.keys():
        start["head_dim"], start["rotary_channels"] = 0, -1
    return typed(ModelConfig, _overlay(start, given), where)


def refuse_kept(changes: Values, where: str) -> None:
    """Refuses a growth that names what every growth keeps: it would be ignored otherwise."""
    for key in KEPT:
        if key in _without_nulls(changes):
            raise UserError(f"{where}.{key} cannot be set here: a growth keeps the source's")


def resolve_corpus(values: Values) -> Corpus:
    """The text source that the `data` section names."""
    fields = dict(values)
    source = fields.pop("source", None)
    if source not in CORPORA:
        raise UserError(f"data.source {source!r}: valid are {', '.join(CORPORA)}")
    return typed(CORPORA[source], fields, "data")


def resolve_tokenizer(values: Values) -> TokenizerConfig:
    """The tokenizer of the `tokenizer` section."""
    return typed(TokenizerConfig, values, "tokenizer")


def checkpoint_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer on whose tokens a checkpoint was trained.

    Raises:
        UserError: a checkpoint that was saved without one.
    """
    if checkpoint.tokenizer is None or checkpoint.end_of_text is None:
        raise UserError(f"{checkpoint.folder} holds no tokenizer: it was saved without one")
    return Tokenizer.from_json(checkpoint.tokenizer, checkpoint.end_of_text)


def _without_nulls(values: Values) -> Values:
    kept = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            value = _without_nulls(dict(value)) or None
        if value is not None:
            kept[key] = value
    return kept


def _overlay(below: Values, above: Mapping[str, Any]) -> Values:
    """`above` over `below`, mappings merged key by key; null above does not count."""
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, Mapping):
            merged[key] = _overlay(merged.get(key) or {}, value)
        elif value is not None:
            merged[key] = value
    return merged
