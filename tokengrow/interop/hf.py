"""Hugging Face format: write a model as a folder that `transformers` loads, and read it back.

    folder/
        config.json  generation_config.json  model.safetensors
        modeling_tokenformer.py
        tokenizer.json  tokenizer_config.json

The folder contains the code of the model, so `AutoModelForCausalLM.from_pretrained(folder,
trust_remote_code=True)` does not need tokengrow. This module does not need transformers. Optimizer
moments, lineage and recipe of a training run are not exported.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import tokenizers

from tokengrow.checkpoint.layout import TOKENIZER, WEIGHTS
from tokengrow.checkpoint.store import Checkpoint
from tokengrow.checkpoint.tensors import (
    StateDict,
    dtype_name,
    read_safetensors,
    shape_mismatches,
    stream_tensors,
)
from tokengrow.errors import UserError
from tokengrow.model.architectures import as_tokenformer
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import dtype_of, weight_shapes
from tokengrow.parsing import parse_dataclass

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
INDEX = f"{WEIGHTS}.index.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
MODELING_CODE = "modeling_tokenformer.py"

MODEL_TYPE = "tokenformer"
PREFIX = "model."
"""Prefix of tensor names in transformers, where the output head is outside the base model."""

HF_FIELDS = {
    "context_length": "max_position_embeddings",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
}
"""Field of `ModelConfig` to the field of Hugging Face; all other names are equal."""

_CLASSES = {
    "AutoConfig": "TokenFormerConfig",
    "AutoModel": "TokenFormerModel",
    "AutoModelForCausalLM": "TokenFormerForCausalLM",
}
_REMEDY = "Export the model again."


def is_hf(folder: Path) -> bool:
    """Return whether a folder holds a TokenFormer for transformers, by its config."""
    try:
        return _read_json(folder / CONFIG).get("model_type") == MODEL_TYPE
    except UserError:
        return False


def write_hf(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the model and the tokenizer of a checkpoint for transformers.

    Args:
        folder: an existing empty directory.
        checkpoint: checkpoint to write; tensors keep their dtype.

    Raises:
        UserError: the model is not a TokenFormer, or the tokenizer cannot be read or lacks the
            end-of-text token.
    """
    as_tokenformer(checkpoint.config, "to=hf exports no other models.")
    ids: dict[str, int | None] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if checkpoint.tokenizer is not None:
        tokenizer = _parse_tokenizer(checkpoint.tokenizer, "The tokenizer of the checkpoint")
        if (token := checkpoint.end_of_text) is not None:
            if (end_of_text := tokenizer.token_to_id(token)) is None:
                raise UserError(
                    "end_of_text must be a token of the checkpoint's tokenizer, got "
                    f"{token!r}. Give one of its tokens."
                )
            ids = dict.fromkeys(ids, end_of_text)
        _write_tokenizer(folder, tokenizer, checkpoint)
    _write_json(folder / CONFIG, _hf_config(checkpoint) | ids)
    _write_json(folder / GENERATION_CONFIG, ids)
    shutil.copyfile(Path(__file__).with_name(MODELING_CODE), folder / MODELING_CODE)
    weights = {f"{PREFIX}{name}": tensor for name, tensor in checkpoint.weights.items()}
    stream_tensors(folder / WEIGHTS, weights.items(), len(weights), {"format": "pt"})


def read_hf(folder: Path) -> Checkpoint:
    """Read a folder of `write_hf`, or one that `save_pretrained` of transformers made from it.

    Returns:
        A checkpoint with the model and, if the folder has one, the tokenizer. The weights are
        memory-mapped.

    Raises:
        UserError: a file is missing or damaged, or the tensors do not match the config.
    """
    values = _read_json(folder / CONFIG)
    config = _model_config(folder / CONFIG, values)
    path, tokenizer, end_of_text = folder / TOKENIZER, None, None
    if path.is_file():
        parsed = _parse_tokenizer(path.read_bytes().decode(errors="replace"), str(path))
        # Serialised again, because transformers writes the same JSON over many lines.
        tokenizer, eos = parsed.to_str(), values.get("eos_token_id")
        if isinstance(eos, int) and 0 <= eos < config.vocab_size:
            end_of_text = parsed.id_to_token(eos)
    return Checkpoint(
        config=config,
        weights=_read_weights(folder, config),
        tokenizer=tokenizer,
        end_of_text=end_of_text,
    )


def _hf_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return config.json without the ids of special tokens."""
    sizes = {HF_FIELDS.get(key, key): value for key, value in checkpoint.config.to_dict().items()}
    return sizes | {
        "model_type": MODEL_TYPE,
        "architectures": [_CLASSES["AutoModelForCausalLM"]],
        "auto_map": {auto: f"{Path(MODELING_CODE).stem}.{name}" for auto, name in _CLASSES.items()},
        "dtype": dtype_name(dtype_of(checkpoint.weights)),
        "tie_word_embeddings": True,
        "use_cache": True,
    }


def _model_config(path: Path, values: Mapping[str, Any]) -> ModelConfig:
    """Return the model config in config.json."""
    if (model_type := values.get("model_type")) != MODEL_TYPE:
        raise UserError(
            f"{path}: model_type must be {MODEL_TYPE!r}, got {model_type!r}. Give a TokenFormer."
        )
    names = {field.name: HF_FIELDS.get(field.name, field.name) for field in fields(ModelConfig)}
    if missing := [name for name in names.values() if name not in values]:
        raise UserError(f"{path} lacks {', '.join(missing)}. {_REMEDY}")
    try:
        return parse_dataclass(
            ModelConfig, {key: values[name] for key, name in names.items()}, "model"
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _read_weights(folder: Path, config: ModelConfig) -> StateDict:
    """Return the tensors by the names of tokengrow, after a check of their names and shapes."""
    tensors: StateDict = {}
    for name in _weight_files(folder):
        tensors |= read_safetensors(folder / name)
    shapes = {f"{PREFIX}{name}": shape for name, shape in weight_shapes(config).items()}
    if mismatches := shape_mismatches(tensors, shapes):
        raise UserError(
            f"{folder}: the weights do not match {CONFIG}: {'; '.join(mismatches)}. {_REMEDY}"
        )
    return {name.removeprefix(PREFIX): tensors[name] for name in shapes}


def _weight_files(folder: Path) -> list[str]:
    """Return the names of the weights file, or of the shards in the index."""
    if (folder / WEIGHTS).is_file() or not (index := folder / INDEX).is_file():
        return [WEIGHTS]
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise UserError(f"{index} is damaged: it has no weight_map of file names. {_REMEDY}")
    return sorted(set(shards.values()))


def _parse_tokenizer(text: str, origin: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more specific
        raise UserError(f"{origin} is not a tokenizers JSON ({error}). {_REMEDY}") from None


def _write_tokenizer(folder: Path, tokenizer: tokenizers.Tokenizer, checkpoint: Checkpoint) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    if tokenizer.num_special_tokens_to_add(False):
        # tokengrow encodes without the special tokens that a file may add around every text.
        # transformers would add them, and the model was not trained with them.
        tokenizer.post_processor = None
    text, token = tokenizer.to_str(), checkpoint.end_of_text
    (folder / TOKENIZER).write_bytes(text.encode())
    # transformers 4 takes it from the config, where the default is false, and not from the file.
    add_prefix_space = (json.loads(text)["pre_tokenizer"] or {}).get("add_prefix_space", False)
    special = {} if token is None else dict.fromkeys(("bos_token", "eos_token", "pad_token"), token)
    config = special | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": add_prefix_space,
        "model_max_length": checkpoint.config.context_length,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",  # generation appends at the right end
    }
    _write_json(folder / TOKENIZER_CONFIG, config)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} is missing. {_REMEDY}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}). {_REMEDY}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it must hold a mapping. {_REMEDY}")
    return values
