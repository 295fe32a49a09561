"""The Hugging Face door: a model as a folder that `transformers` loads, and back.

    folder/
        config.json  generation_config.json  model.safetensors
        modeling_tokenformer.py
        tokenizer.json  tokenizer_config.json

The code travels with the weights: `AutoModelForCausalLM.from_pretrained(folder,
trust_remote_code=True)` needs no tokengrow, and nothing here needs transformers. What belongs to a
training run (moments, lineage, recipe) stays behind.
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
GENERATION = "generation_config.json"
INDEX = f"{WEIGHTS}.index.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CODE = "modeling_tokenformer.py"

MODEL_TYPE = "tokenformer"
PREFIX = "model."
"""What transformers puts before our tensors' names: the output head stands beside the model."""

WORDS = {
    "context_length": "max_position_embeddings",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
}
"""Our field to Hugging Face's; all others are called alike."""

_CLASSES = {
    "AutoConfig": "TokenFormerConfig",
    "AutoModel": "TokenFormerModel",
    "AutoModelForCausalLM": "TokenFormerForCausalLM",
}
_WAY_OUT = "export the model again"


def is_hf(folder: Path) -> bool:
    """Whether a folder holds a TokenFormer for transformers, by its config."""
    try:
        return _read_json(folder / CONFIG).get("model_type") == MODEL_TYPE
    except UserError:
        return False


def write_hf(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint's model and tokenizer as transformers reads them.

    Args:
        folder: exists and is empty.
        checkpoint: what to write; tensors keep their dtype.

    Raises:
        UserError: a tokenizer that cannot be read or lacks the end of text, or no TokenFormer.
    """
    as_tokenformer(checkpoint.config, "to=hf exports no other models.")
    ids: dict[str, int | None] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if checkpoint.tokenizer is not None:
        tokenizer = _tokenizer(checkpoint.tokenizer, "the checkpoint's tokenizer")
        ids = dict.fromkeys(ids, _end_of_text_id(tokenizer, checkpoint.end_of_text))
        _write_tokenizer(folder, tokenizer, checkpoint)
    _write_json(folder / CONFIG, _hf_config(checkpoint) | ids)
    _write_json(folder / GENERATION, ids)
    shutil.copyfile(Path(__file__).with_name(CODE), folder / CODE)
    weights = {f"{PREFIX}{name}": tensor for name, tensor in checkpoint.weights.items()}
    stream_tensors(folder / WEIGHTS, weights.items(), len(weights), {"format": "pt"})


def read_hf(folder: Path) -> Checkpoint:
    """Reads what `write_hf` wrote, or what transformers' `save_pretrained` made of it.

    Returns:
        A checkpoint of the model and, if there is one, the tokenizer; the weights are mapped into
        memory, not read.

    Raises:
        UserError: a file is missing or damaged, or the tensors are not those of the config.
    """
    values = _read_json(folder / CONFIG)
    config = _model_config(folder / CONFIG, values)
    path, tokenizer, end_of_text = folder / TOKENIZER, None, None
    if path.is_file():
        inner = _tokenizer(path.read_bytes().decode(errors="replace"), str(path))
        # Our one-line form: transformers writes the same JSON over many lines.
        tokenizer, eos = inner.to_str(), values.get("eos_token_id")
        if isinstance(eos, int) and 0 <= eos < config.vocab_size:
            end_of_text = inner.id_to_token(eos)
    return Checkpoint(
        config=config,
        weights=_read_weights(folder, config),
        tokenizer=tokenizer,
        end_of_text=end_of_text,
    )


def _hf_config(checkpoint: Checkpoint) -> dict[str, Any]:
    sizes = {WORDS.get(key, key): value for key, value in checkpoint.config.to_dict().items()}
    return sizes | {
        "model_type": MODEL_TYPE,
        "architectures": [_CLASSES["AutoModelForCausalLM"]],
        "auto_map": {auto: f"{Path(CODE).stem}.{name}" for auto, name in _CLASSES.items()},
        "dtype": dtype_name(dtype_of(checkpoint.weights)),
        "tie_word_embeddings": True,
        "use_cache": True,
    }


def _model_config(path: Path, values: Mapping[str, Any]) -> ModelConfig:
    if (found := values.get("model_type")) != MODEL_TYPE:
        raise UserError(f"{path}: model_type is {found!r}, not {MODEL_TYPE!r}: give a TokenFormer")
    words = {field.name: WORDS.get(field.name, field.name) for field in fields(ModelConfig)}
    if missing := [word for word in words.values() if word not in values]:
        raise UserError(f"{path} lacks {', '.join(missing)}: {_WAY_OUT}")
    try:
        return parse_dataclass(
            ModelConfig, {key: values[word] for key, word in words.items()}, "model"
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _read_weights(folder: Path, config: ModelConfig) -> StateDict:
    """The tensors by our names, all there and of the right shape."""
    found: StateDict = {}
    for name in _weight_files(folder):
        found |= read_safetensors(folder / name)
    wanted = {f"{PREFIX}{name}": shape for name, shape in weight_shapes(config).items()}
    if wrong := shape_mismatches(found, wanted):
        raise UserError(
            f"{folder}: the weights are not those of {CONFIG}: {'; '.join(wrong)}; {_WAY_OUT}"
        )
    return {name.removeprefix(PREFIX): found[name] for name in wanted}


def _weight_files(folder: Path) -> list[str]:
    """One file, or the shards that the index names."""
    if (folder / WEIGHTS).is_file() or not (index := folder / INDEX).is_file():
        return [WEIGHTS]
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise UserError(f"{index} is damaged: it has no weight_map of file names: {_WAY_OUT}")
    return sorted(set(shards.values()))


def _tokenizer(text: str, where: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more precise
        raise UserError(f"{where} is no tokenizers JSON ({error}): {_WAY_OUT}") from None


def _end_of_text_id(tokenizer: tokenizers.Tokenizer, token: str | None) -> int | None:
    if token is None:
        return None
    if (found := tokenizer.token_to_id(token)) is None:
        raise UserError(f"end_of_text: the checkpoint's tokenizer has no {token!r}: name its own")
    return found


def _write_tokenizer(folder: Path, tokenizer: tokenizers.Tokenizer, checkpoint: Checkpoint) -> None:
    if tokenizer.num_special_tokens_to_add(False):
        # tokengrow encodes without the tokens that a file may want around every text; transformers
        # puts them there, before a model that has never seen them.
        tokenizer.post_processor = None
    text, token = tokenizer.to_str(), checkpoint.end_of_text
    (folder / TOKENIZER).write_bytes(text.encode())
    # transformers 4 overrules the file by what the config says, which by default is no.
    prefix = (json.loads(text)["pre_tokenizer"] or {}).get("add_prefix_space", False)
    special = {} if token is None else dict.fromkeys(("bos_token", "eos_token", "pad_token"), token)
    config = special | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": prefix,
        "model_max_length": checkpoint.config.context_length,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",  # generation goes on at the right end
    }
    _write_json(folder / TOKENIZER_CONFIG, config)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} is missing: {_WAY_OUT}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {_WAY_OUT}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it holds no mapping: {_WAY_OUT}")
    return values
