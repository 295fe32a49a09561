"""Conversion of a GPT-NeoX YAML into a recipe of the same run, with a list of inexact keys."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tokengrow.data.megatron_source import MegatronConfig
from tokengrow.data.tokenizer import END_OF_TEXT, Tokenizer
from tokengrow.errors import UserError
from tokengrow.growth.plan import INHERITED_FIELDS
from tokengrow.interop.neox_config import (
    PUBLISHED_INIT,
    NeoxConfig,
    Values,
    parse_file_values,
    read_neox_yaml,
    split_keys,
)
from tokengrow.interop.neox_training import JSON_TOKENIZER, SCHEDULES, NeoxTraining
from tokengrow.model.config import ModelConfig
from tokengrow.model.presets import PADDED_VOCABULARY, PRESETS
from tokengrow.parsing import MISSING_VALUE

NO_DEFAULT = "${tokengrow.missing:}"
"""Value that the user must set. `???` would keep the value of run.yaml, if it has one."""

KEEP_ALL = 1_000_000
"""Value of keep_checkpoints that is larger than the number of checkpoints of any run."""

GPT_NEOX_VOCABULARY = 50277
"""Entries of the GPT-NeoX tokenizer, which the published models use."""

INHERITED_KEYS: dict[str, tuple[str, ...]] = {
    "tau": (),
    "rotary_channels": ("rotary_pct",),
    "rotary_base": ("rotary_emb_base",),
    "norm_eps": ("layernorm_epsilon",),
    "final_norm_eps": ("layernorm_epsilon",),
    "init": tuple(PUBLISHED_INIT),
}
"""Model field that a growth does not change, to its GPT-NeoX keys."""

BLENDED = re.compile(r"(train|valid|test|label)_data_(paths|weights)")
"""Keys that mix several data sets."""

REASONS = (
    (r"fp16|bf16|fp32.*|precision|amp|loss_scale.*", "bf16-mixed, no loss scaling"),
    (
        r"launcher|deepspeed_(slurm|mpi)|no_ssh_check|hostfile|include|exclude",
        "set by the launcher",
    ),
    (r"num_(nodes|gpus)|master_.*|distributed_backend|adlr_autoresume.*", "set by the launcher"),
    (r".*_fusion", "fused kernels: no effect"),
    (
        r"checkpoint_(activations|num_layers|in_cpu)|partition_activations|synchronize_each_layer"
        r"|contiguous_checkpointing|deepspeed_activation_checkpointing",
        "activation checkpointing: no effect",
    ),
    (r"zero_.*|deepspeed.*|optimizer\..*", "DeepSpeed / ZeRO: not used"),
    (r".*wandb.*|tensorboard.*|log_.*|comet.*", "logging service: use logger="),
    (r"steps_per_print|wall_clock_breakdown", "console output: no effect"),
    (r"num_workers|mmap_warmup|use_shared_fs", "data loading: no effect"),
    (r"save|load|config_files", "paths: use out= and source="),
    (r"extra_save_iters", "checkpoints: use checkpoint_every="),
    (r"checkpoint_validation_.*", "self-test of the published code"),
    (r"output_layer_parallelism|pipe_partition_method", "model parallelism: not available"),
    (r"max_position_embeddings", "learned positions: not available"),
)
"""Pattern of keys to the reason why they are not converted; the first match counts."""


@dataclass(frozen=True)
class NeoxRecipe:
    """Recipe made from a GPT-NeoX YAML."""

    name: str
    """Name of the recipe."""
    text: str
    """YAML of the recipe."""
    missing: list[str]
    """Dotted keys that the user must set."""
    inexact: dict[str, str]
    """GPT-NeoX keys that are not converted, or not exactly, with the reason."""
    assumed_vocabulary: str | None
    """Size of the vocabulary and the reason for it, if it is an assumption."""


class Commented(NamedTuple):
    """Value of a recipe with the comment after it."""

    value: Any
    """Value of the key."""
    comment: str
    """Comment on the same line."""


@dataclass(frozen=True)
class Vocabulary:
    """V, the rows of the embedding: the entries of the tokenizer, padded."""

    rows: int | None
    """Number of rows; None: the user must set it."""
    origin: str
    """Origin of the number, as a comment."""
    is_assumed: bool = False
    """Whether the entries are assumed, because the tokenizer cannot be read."""

    @classmethod
    def from_tokenizer(
        cls, training: NeoxTraining, multiple: int, file: str | None, end_of_text: str
    ) -> "Vocabulary":
        """Count the entries of a tokenizer and pad them as GPT-NeoX does.

        Args:
            training: training keys, of which the kind of tokenizer is used.
            multiple: the number of rows is a multiple of this.
            file: `tokenizers` JSON file.
            end_of_text: token of the file that ends a document.

        Raises:
            UserError: if the file exists and cannot be read.
        """
        padded = f"padded to a multiple of {multiple}"
        if file and Path(file).expanduser().is_file():
            entries = Tokenizer.from_file(file, end_of_text).vocab_size
            return cls(_pad(entries, multiple), f"{entries} entries of {file}, {padded}")
        if training.tokenizer_type != JSON_TOKENIZER:
            return cls(None, f"entries of the tokenizer, {padded}")
        reason = f"{file} does not exist" if file else "the YAML has no vocab_file"
        origin = f"assumed: {GPT_NEOX_VOCABULARY} entries of the GPT-NeoX tokenizer, {padded}"
        return cls(_pad(GPT_NEOX_VOCABULARY, multiple), f"{origin}; {reason}", is_assumed=True)


def neox_recipe(
    path: Path, gpus: int | None, tokenizer: str | None = None, end_of_text: str = END_OF_TEXT
) -> NeoxRecipe:
    """Convert a GPT-NeoX YAML into a recipe.

    Args:
        path: path of the YAML.
        gpus: number of data-parallel processes, which the YAML does not contain; None: unknown.
        tokenizer: `tokenizers` JSON file to use instead of that of the YAML.
        end_of_text: token of the file that ends a document.

    Raises:
        UserError: if a required key is missing, or a value has no equivalent in tokengrow.
    """
    values = read_neox_yaml(path)
    if blended := [key for key in values if BLENDED.fullmatch(key) and values[key] is not None]:
        raise UserError(f"{path}: {', '.join(blended)} must be null. Give one data_path instead.")
    model = NeoxConfig.from_values(values, path)
    given, unread = split_keys(NeoxTraining, values)
    training = parse_file_values(path, NeoxTraining, given)
    try:
        batch, micro = training.batch_size(gpus), training.micro_batch_size(gpus)
        MegatronConfig(prefix=str(training.data_path), split=training.split)
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix('data.')}") from None
    file = tokenizer or (training.vocab_file if training.tokenizer_type == JSON_TOKENIZER else None)
    multiple = training.make_vocab_size_divisible_by * model.model_parallel_size
    vocabulary = Vocabulary.from_tokenizer(training, multiple, file, end_of_text)
    sizes = model.to_model(PADDED_VOCABULARY)
    preset = next((name for name in PRESETS if ModelConfig.preset(name) == sizes), None)
    name = re.sub(r"[^a-z0-9.]+", "-", path.stem.lower()).strip("-") or "neox"
    sections: Values = {
        "name": name,
        **_run_section(training, gpus, batch, micro),
        "model": _model_section(model, training, preset, vocabulary),
        "data": {
            "prefix": training.data_path
            or Commented(MISSING_VALUE, "path of the token files, without .bin and .idx"),
            "split": training.split,
        },
        "tokenizer": {
            "file": file or Commented(MISSING_VALUE, "path of a tokenizers JSON file"),
            **({} if end_of_text == END_OF_TEXT else {"end_of_text": end_of_text}),
        },
        "optim": _optim_section(training),
        "stages": {"train": {"steps": training.train_iters}},
    }
    return NeoxRecipe(
        name=name,
        text="\n".join([*_header(path, training, preset), *_yaml_lines(sections), ""]),
        missing=list(_missing_keys(sections)),
        inexact=_inexact_keys(values, unread, model, training, batch, vocabulary),
        assumed_vocabulary=(
            f"{vocabulary.rows}, {vocabulary.origin}" if vocabulary.is_assumed else None
        ),
    )


def _pad(number: int, multiple: int) -> int:
    """Round a number up to a multiple."""
    return -(-number // multiple) * multiple


def _header(path: Path, training: NeoxTraining, preset: str | None) -> Iterator[str]:
    """Yield the lines before the keys: comments and the defaults list."""
    yield "# @package _global_"
    yield f"# Recipe of the GPT-NeoX config {_one_line(path.name)}, made by `tokengrow convert`."
    if training.pretrain_partial_init:
        yield f"# It grows the model of {_one_line(training.pretrain_partial_init)}. Convert that"
        yield "# model first, and give its DIR as source:"
        yield "# tokengrow convert source=FILE config=YAML to=tokengrow out=DIR"
    yield "defaults:"
    growth = "published" if training.pretrain_partial_init else None
    groups = {"model": preset, "data": "megatron", "tokenizer": "file", "growth": growth}
    yield from (f"  - override /{group}: {name}" for group, name in groups.items() if name)
    yield ""


def _run_section(
    training: NeoxTraining, gpus: int | None, batch: int | None, micro: int | None
) -> Values:
    """Return the top-level keys of the recipe."""
    share = "train_batch_size / GPUs / gradient_accumulation_steps"
    keys = {
        "source": Commented(NO_DEFAULT, "DIR of the command above")
        if training.pretrain_partial_init
        else None,
        "seed": training.seed,
        "batch_size": Commented(batch or NO_DEFAULT, training.batch_size_origin(gpus)),
        "micro_batch_size": micro or (Commented(NO_DEFAULT, share) if batch else None),
        "validation_every": training.eval_interval,
        "validation_sequences": None,
        "checkpoint_every": training.checkpoint_factor,
        "keep_checkpoints": training.keep_last_n_checkpoints
        or Commented(KEEP_ALL, "all: the YAML has no keep_last_n_checkpoints"),
        "log_every": training.log_interval,
    }
    if batch:
        batches = training.eval_iters
        keys["validation_sequences"] = Commented(batches * batch, f"{batches} batches")
    if training.checkpoint_scale != "linear":
        keys["checkpoint_every"] = None
    return {key: value for key, value in keys.items() if value is not None}


def _model_section(
    model: NeoxConfig, training: NeoxTraining, preset: str | None, vocabulary: Vocabulary
) -> Values:
    """Return the model section; it is empty if the preset has all values."""
    section = {"vocab_size": Commented(vocabulary.rows or NO_DEFAULT, vocabulary.origin)}
    if preset:
        is_preset_size = vocabulary.rows == PADDED_VOCABULARY and not vocabulary.is_assumed
        return {} if is_preset_size else section
    sizes = model.to_model(PADDED_VOCABULARY).to_dict()
    derived = {"vocab_size", "head_dim", "tau"}
    if training.pretrain_partial_init:
        derived |= set(INHERITED_FIELDS)  # a growth keeps the values of the source
    return section | {key: value for key, value in sizes.items() if key not in derived}


def _optim_section(training: NeoxTraining) -> Values:
    """Return the optimizer settings and the learning-rate schedule."""
    adam, decay = training.optimizer.params, training.lr_decay_iters or training.train_iters
    warmup = f"{training.warmup:g} x {decay} updates"
    settings = {
        "lr": adam.lr,
        "min_lr": training.min_lr,
        "warmup_steps": Commented(training.warmup * decay, warmup),
        "schedule": SCHEDULES[training.lr_decay_style],
        "decay_steps": decay if decay != training.train_iters else None,
        "betas": list(adam.betas),
        "eps": adam.eps,
        "weight_decay": training.weight_decay,
        "grad_clip": training.gradient_clipping,
    }
    return {key: value for key, value in settings.items() if value is not None}


def _inexact_keys(
    values: Values,
    unread: list[str],
    model: NeoxConfig,
    training: NeoxTraining,
    batch: int | None,
    vocabulary: Vocabulary,
) -> dict[str, str]:
    """Return the keys that are not converted, or not exactly, with the reason.

    Args:
        values: all keys of the YAML.
        unread: dotted keys that are not training keys.
        model: model keys of the YAML.
        training: training keys of the YAML.
        batch: sequences per update; None: unknown.
        vocabulary: rows of the embedding.

    Returns:
        Dotted key to the reason, in the order of the YAML.
    """
    unknown = [key for key in unread if key not in {item.name for item in fields(NeoxConfig)}]
    if values.get("max_position_embeddings") == model.seq_length:
        unknown.remove("max_position_embeddings")
    reasons = _reasons_of_read_keys(model, training, batch, vocabulary)
    reasons = {key: reason for key, reason in reasons.items() if values.get(key) is not None}
    for key in unknown:
        matches = (reason for pattern, reason in REASONS if re.fullmatch(pattern, key))
        reasons.setdefault(key, next(matches, "unknown key"))
    # A dotted key has the position of its outermost key.
    keys = list(values)
    position = {
        key: next(n for n, outer in enumerate(keys) if key == outer or key.startswith(f"{outer}."))
        for key in reasons
    }
    return {key: reasons[key] for key in sorted(reasons, key=lambda key: position[key])}


def _reasons_of_read_keys(
    model: NeoxConfig, training: NeoxTraining, batch: int | None, vocabulary: Vocabulary
) -> dict[str, str]:
    """Return the reasons why keys that are read are not converted, or not exactly."""
    reasons: dict[str, str] = {}
    if not model.has_published_init:
        reasons |= dict.fromkeys(PUBLISHED_INIT, "replaced by init: balanced")
    if training.pretrain_partial_init:
        inherited = (key for name in INHERITED_FIELDS for key in INHERITED_KEYS[name])
        reasons |= dict.fromkeys(inherited, "a growth keeps the value of the source")
    if training.lr_decay_style == "constant":
        reasons["lr_decay_style"] = "constant: the warm-up is one update ahead"
    if training.tokenizer_type != JSON_TOKENIZER:
        reason = f"only files of {JSON_TOKENIZER} are read"
        reasons |= {"tokenizer_type": reason, "vocab_file": reason}
    if vocabulary.rows is None:
        reasons["make_vocab_size_divisible_by"] = "set model.vocab_size"
    if training.checkpoint_scale != "linear":
        keys = ("checkpoint_scale", "checkpoint_factor")
        reasons |= dict.fromkeys(keys, "checkpoints at equal intervals")
    if batch is None:
        reasons["eval_iters"] = "set validation_sequences"
    return reasons


def _yaml_lines(values: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Yield lines of YAML with comments, and an empty line before each section."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            if value:
                yield from ([] if indent else [""])
                yield f"{indent}{key}:"
                yield from _yaml_lines(value, f"{indent}  ")
            continue
        value, comment = value if isinstance(value, Commented) else (value, "")
        line = f"{indent}{key}: {_scalar(value)}"
        yield f"{line:<29} # {_one_line(comment)}" if comment else line


def _scalar(value: Any) -> str:
    """Return a value as YAML on one line, with Hydra's interpolations in text escaped."""
    if value in (MISSING_VALUE, NO_DEFAULT):
        return str(value)
    if isinstance(value, str):
        value = value.replace("${", "\\${")
    text = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10**6)
    return text.strip()[1:-1]


def _one_line(text: str) -> str:
    """Replace line breaks by spaces, so that a comment stays a comment."""
    return " ".join(text.split())


def _missing_keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys that the user must set."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _missing_keys(value, f"{prefix}{key}.")
        elif isinstance(value, Commented) and value.value in (MISSING_VALUE, NO_DEFAULT):
            yield f"{prefix}{key}"
