"""A GPT-NeoX YAML as a recipe: the same run, and every key that tokengrow has no use for."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from tokengrow.checkpoint.neox_config import (
    PUBLISHED_INIT,
    NeoxConfig,
    Values,
    divide,
    read_neox_yaml,
    typed_from,
)
from tokengrow.cli.neox_training import JSON_TOKENIZER, SCHEDULES, NeoxTraining
from tokengrow.errors import UserError
from tokengrow.growth.plan import KEPT
from tokengrow.model.config import ModelConfig
from tokengrow.model.presets import PADDED_VOCABULARY, PRESETS
from tokengrow.typed import MISSING_VALUE

NO_DEFAULT = "${tokengrow.missing:}"
"""The user has to give it. Where run.yaml has a value, `???` would leave that in place."""

BLENDED = re.compile(r"(train|valid|test|label)_data_(paths|weights)")
"""Keys that mix several data sets."""

REASONS = (
    (r"fp16|bf16|fp32.*|precision|amp|loss_scale.*", "bf16-mixed, no loss scaling"),
    (r"launcher|deepspeed_(slurm|mpi)|no_ssh_check|hostfile|include|exclude", "launcher"),
    (r"num_(nodes|gpus)|master_.*|distributed_backend|adlr_autoresume.*", "launcher"),
    (r".*_fusion", "fused kernels: no effect"),
    (
        r"checkpoint_(activations|num_layers|in_cpu)|partition_activations|synchronize_each_layer"
        r"|contiguous_checkpointing|deepspeed_activation_checkpointing",
        "activation checkpointing: no effect",
    ),
    (r"zero_.*|deepspeed.*|optimizer\..*", "DeepSpeed / ZeRO"),
    (r".*wandb.*|tensorboard.*|log_.*|comet.*", "logging service: see logger="),
    (r"steps_per_print|wall_clock_breakdown", "console output"),
    (r"num_workers|mmap_warmup|use_shared_fs", "data loading: no effect"),
    (r"save|load|config_files", "see out= and source="),
    (r"extra_save_iters|checkpoint_scale", "checkpoints: checkpoint_every alone"),
    (r"checkpoint_validation_.*", "self-test of the published code"),
    (r"output_layer_parallelism|pipe_partition_method", "model parallelism: there is none"),
    (r"max_position_embeddings", "learned positions: there are none"),
)
"""(keys, why they are left out), the first that matches; any other key is unknown to tokengrow."""


@dataclass(frozen=True)
class NeoxRecipe:
    """What became of a YAML."""

    name: str
    """Of the recipe."""
    text: str
    """Its YAML."""
    missing: list[str]
    """The keys that its user still has to give."""
    left: dict[str, str]
    """Key of the GPT-NeoX YAML that was not carried over to the reason."""


def neox_recipe(path: Path, gpus: int | None, tokenizer: str | None = None) -> NeoxRecipe:
    """Translates a GPT-NeoX YAML.

    Args:
        path: of the YAML.
        gpus: data-parallel processes, of which the YAML says nothing.
        tokenizer: file to use in place of the YAML's.

    Raises:
        UserError: a key that is missing, or a value that would make it another run.
    """
    values = read_neox_yaml(path)
    if blended := [key for key in values if BLENDED.fullmatch(key) and values[key] is not None]:
        raise UserError(f"{path}: {', '.join(blended)}: tokengrow takes one data_path")
    model = NeoxConfig.of(values, path)
    given, left = divide(NeoxTraining, values)
    training = typed_from(path, NeoxTraining, given)
    try:
        batch = training.batch_size(gpus)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    name, preset = _name(path), _preset(model)
    sections: Values = {
        "name": name,
        **_top(training, gpus, batch),
        "model": _model(model, training, preset),
        "data": _data(training),
        "tokenizer": _tokenizer(training, tokenizer),
        "optim": _optim(training),
        "stages": {"train": {"steps": training.train_iters}},
    }
    return NeoxRecipe(
        name=name,
        text="\n".join([*_head(path, training, preset), *_lines(sections), ""]),
        missing=list(_missing(sections)),
        left=_left(values, left, model, training, batch),
    )


def _name(path: Path) -> str:
    """A recipe's name, made of a file's: small letters, digits, dots and hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", path.stem.lower()).strip("-") or "neox"


def _preset(model: NeoxConfig) -> str | None:
    """The published size that these keys are."""
    sizes = model.model(PADDED_VOCABULARY)
    return next((name for name in PRESETS if ModelConfig.preset(name) == sizes), None)


def _head(path: Path, training: NeoxTraining, preset: str | None) -> Iterator[str]:
    """What stands above the keys."""
    yield "# @package _global_"
    yield f"# Made by `tokengrow convert` of the GPT-NeoX configuration {_one_line(path.name)}."
    if training.pretrain_partial_init:
        yield f"# It grows the model of {_one_line(training.pretrain_partial_init)}: first"
        yield "# tokengrow convert source=FILE config=YAML to=tokengrow out=DIR"
    yield "defaults:"
    groups = {"model": preset, "data": "megatron", "tokenizer": "file"}
    yield from (f"  - override /{group}: {name}" for group, name in groups.items() if name)
    yield ""


def _top(training: NeoxTraining, gpus: int | None, batch: int | None) -> Values:
    """The keys of a run that are in no section."""
    keys = {
        "source": (NO_DEFAULT, "the DIR above") if training.pretrain_partial_init else None,
        "seed": training.seed,
        "batch_size": (batch or NO_DEFAULT, training.batch_text(gpus)),
        "micro_batch_size": training.train_micro_batch_size_per_gpu,
        "validation_every": training.eval_interval,
        "validation_sequences": None,
        "checkpoint_every": training.checkpoint_factor,
        "keep_checkpoints": training.keep_last_n_checkpoints,
        "log_every": training.log_interval,
    }
    if batch:
        iters = training.eval_iters
        keys["validation_sequences"] = (iters * batch, f"{iters} batches")
    if training.checkpoint_scale != "linear":
        keys["checkpoint_every"] = None
    return {key: value for key, value in keys.items() if value is not None}


def _model(model: NeoxConfig, training: NeoxTraining, preset: str | None) -> Values:
    """The model section; empty if the preset says it all."""
    rows = training.padded_vocabulary
    why = "the GPT-NeoX tokenizer's 50277, padded" if rows else "the YAML does not say it"
    vocabulary = {"vocab_size": (rows or NO_DEFAULT, why)}
    if preset:
        return {} if rows else vocabulary
    sizes = model.model(PADDED_VOCABULARY).to_dict()
    derived = {"vocab_size", "head_dim", "tau"}
    if training.pretrain_partial_init:
        derived |= set(KEPT)  # a growth keeps the source's
    return vocabulary | {key: value for key, value in sizes.items() if key not in derived}


def _data(training: NeoxTraining) -> Values:
    missing = (MISSING_VALUE, "of the token files, without .bin and .idx")
    return {"prefix": training.data_path or missing, "split": training.split}


def _tokenizer(training: NeoxTraining, file: str | None) -> Values:
    if training.tokenizer_type == JSON_TOKENIZER:
        file = file or training.vocab_file
    return {"file": file or (MISSING_VALUE, "a tokenizers JSON file")}


def _optim(training: NeoxTraining) -> Values:
    adam, decay = training.optimizer.params, training.lr_decay_iters or training.train_iters
    settings = {
        "lr": adam.lr,
        "min_lr": training.min_lr,
        "warmup_steps": (training.warmup * decay, f"{training.warmup:g} of {decay}"),
        "schedule": SCHEDULES[training.lr_decay_style],
        "decay_steps": decay if decay != training.train_iters else None,
        "betas": list(adam.betas),
        "eps": adam.eps,
        "weight_decay": training.weight_decay,
        "grad_clip": training.gradient_clipping,
    }
    return {key: value for key, value in settings.items() if value is not None}


def _left(
    values: Values, left: list[str], model: NeoxConfig, training: NeoxTraining, batch: int | None
) -> dict[str, str]:
    """Why each key was not carried over, in the order of the YAML."""
    unread = set(left) - {item.name for item in fields(NeoxConfig)}
    if values.get("max_position_embeddings") == model.seq_length:
        unread.discard("max_position_embeddings")
    special: dict[str, str] = {}
    if not model.starts_as_published:
        special |= dict.fromkeys(PUBLISHED_INIT, "weights start by init: balanced")
    if training.tokenizer_type != JSON_TOKENIZER:
        why = f"{JSON_TOKENIZER}'s files alone are read"
        special |= {"tokenizer_type": why, "vocab_file": why}
    if training.checkpoint_scale != "linear":
        special["checkpoint_factor"] = "checkpoints at equal distances"
    if batch is None:
        special["eval_iters"] = "set validation_sequences"
    found = {key: why for key, why in special.items() if values.get(key) is not None}
    found |= {key: _reason(key) for key in unread if key not in found}
    order = list(values)
    return dict(sorted(found.items(), key=lambda item: order.index(_outermost(item[0], order))))


def _outermost(key: str, keys: list[str]) -> str:
    """The key of the YAML itself in which a dotted key lies."""
    return next(each for each in keys if key == each or key.startswith(f"{each}."))


def _reason(key: str) -> str:
    matching = (reason for keys, reason in REASONS if re.fullmatch(keys, key))
    return next(matching, "unknown to tokengrow")


def _lines(values: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """YAML with its comments, sections apart."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            if value:
                yield from ([] if indent else [""])
                yield f"{indent}{key}:"
                yield from _lines(value, f"{indent}  ")
            continue
        value, comment = value if isinstance(value, tuple) else (value, "")
        line = f"{indent}{key}: {_scalar(value)}"
        yield f"{line:<29} # {_one_line(comment)}" if comment else line


def _scalar(value: Any) -> str:
    """A value on one line; in text, what Hydra would take for a reference is escaped."""
    if value in (MISSING_VALUE, NO_DEFAULT):
        return str(value)
    if isinstance(value, str):
        value = value.replace("${", "\\${")
    text = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10**6)
    return text.strip()[1:-1]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _missing(values: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """The dotted keys without a value."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _missing(value, f"{where}{key}.")
        elif isinstance(value, tuple) and value[0] in (MISSING_VALUE, NO_DEFAULT):
            yield f"{where}{key}"
