"""A GPT-NeoX YAML as a recipe: the same run, and every key that tokengrow has no use for."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from tokengrow.data.megatron_source import MegatronConfig
from tokengrow.data.tokenizer import END_OF_TEXT, Tokenizer
from tokengrow.errors import UserError
from tokengrow.growth.plan import INHERITED_FIELDS
from tokengrow.interop.neox_config import (
    PUBLISHED_INIT,
    NeoxConfig,
    Values,
    divide,
    read_neox_yaml,
    typed_from,
)
from tokengrow.interop.neox_training import JSON_TOKENIZER, SCHEDULES, NeoxTraining
from tokengrow.model.config import ModelConfig
from tokengrow.model.presets import PADDED_VOCABULARY, PRESETS
from tokengrow.parsing import MISSING_VALUE

NO_DEFAULT = "${tokengrow.missing:}"
"""The user has to give it. Where run.yaml has a value, `???` would leave that in place."""

KEEP_ALL = 1_000_000
"""More checkpoints than any run writes."""

VOCABULARY = 50277
"""Entries of the GPT-NeoX tokenizer, with which the published models were trained."""

KEYS_OF_KEPT: dict[str, tuple[str, ...]] = {
    "tau": (),
    "rotary_channels": ("rotary_pct",),
    "rotary_base": ("rotary_emb_base",),
    "norm_eps": ("layernorm_epsilon",),
    "final_norm_eps": ("layernorm_epsilon",),
    "init": tuple(PUBLISHED_INIT),
}
"""What every growth keeps to the keys of a YAML that say it."""

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
    (r"extra_save_iters", "checkpoints: checkpoint_every alone"),
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
    """Key of the GPT-NeoX YAML that was not carried over, or not exactly, to the reason."""
    assumed: str | None
    """What it takes for granted of the vocabulary."""


@dataclass(frozen=True)
class Vocabulary:
    """V, the rows of the embedding, of which a YAML names the tokenizer alone."""

    rows: int | None
    """Null: the user has to say it."""
    why: str
    """Where the number is from."""
    assumed: bool = False
    """Whether nobody has counted."""

    @classmethod
    def of(cls, training: NeoxTraining, multiple: int, file: str | None, end: str) -> "Vocabulary":
        """The entries of a tokenizer, padded as GPT-NeoX does.

        Args:
            training: says what kind of tokenizer it is.
            multiple: of this number there are rows.
            file: the tokenizer's.
            end: the token of the file that ends a document.

        Raises:
            UserError: the file is there and cannot be read.
        """
        if file and Path(file).expanduser().is_file():
            entries = Tokenizer.from_file(file, end).vocab_size
            return cls(_padded(entries, multiple), f"{file} has {entries}, padded")
        if training.tokenizer_type != JSON_TOKENIZER:
            return cls(None, "the YAML does not say it")
        absent = f"{file} is not there" if file else "the YAML names no vocab_file"
        why = f"assumed: the GPT-NeoX tokenizer's {VOCABULARY}, padded; {absent}"
        return cls(_padded(VOCABULARY, multiple), why, assumed=True)


def neox_recipe(
    path: Path, gpus: int | None, tokenizer: str | None = None, end_of_text: str = END_OF_TEXT
) -> NeoxRecipe:
    """Translates a GPT-NeoX YAML.

    Args:
        path: of the YAML.
        gpus: data-parallel processes, of which the YAML says nothing.
        tokenizer: file to use in place of the YAML's.
        end_of_text: the token of the file that ends a document.

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
        batch, micro = training.batch_size(gpus), training.micro_batch_size(gpus)
        MegatronConfig(prefix=str(training.data_path), split=training.split)
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix('data.')}") from None
    file = tokenizer or (training.vocab_file if training.tokenizer_type == JSON_TOKENIZER else None)
    multiple = training.make_vocab_size_divisible_by * model.model_parallel_size
    vocabulary = Vocabulary.of(training, multiple, file, end_of_text)
    name, preset = _name(path), _preset(model)
    sections: Values = {
        "name": name,
        **_top(training, gpus, batch, micro),
        "model": _model(model, training, preset, vocabulary),
        "data": _data(training),
        "tokenizer": _tokenizer(file, end_of_text),
        "optim": _optim(training),
        "stages": {"train": {"steps": training.train_iters}},
    }
    return NeoxRecipe(
        name=name,
        text="\n".join([*_head(path, training, preset), *_lines(sections), ""]),
        missing=list(_missing(sections)),
        left=_left(values, left, model, _inexact(model, training, batch, vocabulary)),
        assumed=f"{vocabulary.rows}, {vocabulary.why}" if vocabulary.assumed else None,
    )


def _padded(entries: int, multiple: int) -> int:
    """The next multiple of a number."""
    return -(-entries // multiple) * multiple


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
    growth = "published" if training.pretrain_partial_init else None
    groups = {"model": preset, "data": "megatron", "tokenizer": "file", "growth": growth}
    yield from (f"  - override /{group}: {name}" for group, name in groups.items() if name)
    yield ""


def _top(training: NeoxTraining, gpus: int | None, batch: int | None, micro: int | None) -> Values:
    """The keys of a run that are in no section."""
    share = "train_batch_size / GPUs / gradient_accumulation_steps"
    keys = {
        "source": (NO_DEFAULT, "the DIR above") if training.pretrain_partial_init else None,
        "seed": training.seed,
        "batch_size": (batch or NO_DEFAULT, training.batch_text(gpus)),
        "micro_batch_size": micro or ((NO_DEFAULT, share) if batch else None),
        "validation_every": training.eval_interval,
        "validation_sequences": None,
        "checkpoint_every": training.checkpoint_factor,
        "keep_checkpoints": training.keep_last_n_checkpoints
        or (KEEP_ALL, "all: the YAML names none"),
        "log_every": training.log_interval,
    }
    if batch:
        iters = training.eval_iters
        keys["validation_sequences"] = (iters * batch, f"{iters} batches")
    if training.checkpoint_scale != "linear":
        keys["checkpoint_every"] = None
    return {key: value for key, value in keys.items() if value is not None}


def _model(
    model: NeoxConfig, training: NeoxTraining, preset: str | None, vocabulary: Vocabulary
) -> Values:
    """The model section; empty if the preset says it all."""
    section = {"vocab_size": (vocabulary.rows or NO_DEFAULT, vocabulary.why)}
    if preset:
        said = vocabulary.rows == PADDED_VOCABULARY and not vocabulary.assumed
        return {} if said else section
    sizes = model.model(PADDED_VOCABULARY).to_dict()
    derived = {"vocab_size", "head_dim", "tau"}
    if training.pretrain_partial_init:
        derived |= set(INHERITED_FIELDS)  # a growth keeps the source's
    return section | {key: value for key, value in sizes.items() if key not in derived}


def _data(training: NeoxTraining) -> Values:
    missing = (MISSING_VALUE, "of the token files, without .bin and .idx")
    return {"prefix": training.data_path or missing, "split": training.split}


def _tokenizer(file: str | None, end_of_text: str) -> Values:
    section: Values = {"file": file or (MISSING_VALUE, "a tokenizers JSON file")}
    return section if end_of_text == END_OF_TEXT else section | {"end_of_text": end_of_text}


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


def _inexact(
    model: NeoxConfig, training: NeoxTraining, batch: int | None, vocabulary: Vocabulary
) -> dict[str, str]:
    """Why a key that is read may yet not be carried over, or not exactly."""
    found: dict[str, str] = {}
    if not model.starts_as_published:
        found |= dict.fromkeys(PUBLISHED_INIT, "weights start by init: balanced")
    if training.pretrain_partial_init:
        kept = (key for name in INHERITED_FIELDS for key in KEYS_OF_KEPT[name])
        found |= dict.fromkeys(kept, "a growth keeps the source's")
    if training.lr_decay_style == "constant":
        found["lr_decay_style"] = "constant: the warm-up is one update ahead"
    if training.tokenizer_type != JSON_TOKENIZER:
        why = f"{JSON_TOKENIZER}'s files alone are read"
        found |= {"tokenizer_type": why, "vocab_file": why}
    if vocabulary.rows is None:
        found["make_vocab_size_divisible_by"] = "set model.vocab_size"
    if training.checkpoint_scale != "linear":
        keys = ("checkpoint_scale", "checkpoint_factor")
        found |= dict.fromkeys(keys, "checkpoints at equal distances")
    if batch is None:
        found["eval_iters"] = "set validation_sequences"
    return found


def _left(
    values: Values, left: list[str], model: NeoxConfig, inexact: dict[str, str]
) -> dict[str, str]:
    """Why each key was not carried over, or not exactly, in the order of the YAML."""
    unread = set(left) - {item.name for item in fields(NeoxConfig)}
    if values.get("max_position_embeddings") == model.seq_length:
        unread.discard("max_position_embeddings")
    found = {key: why for key, why in inexact.items() if values.get(key) is not None}
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
