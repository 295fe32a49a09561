"""The models that can be trained, by name: what a config is, and what is built of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from tokengrow.errors import UserError
from tokengrow.model import pattention, transformer
from tokengrow.model.config import LanguageModelConfig, ModelConfig
from tokengrow.model.tokenformer import LanguageModel, TokenFormer
from tokengrow.model.transformer import Transformer, TransformerConfig
from tokengrow.parsing import parse_dataclass, suggest

KEY = "architecture"
DEFAULT = "tokenformer"
"""What a `model` section without the key describes."""


@dataclass(frozen=True)
class Architecture:
    """A kind of model."""

    config: type[LanguageModelConfig]
    """Its sizes."""
    model: type[LanguageModel]
    """What is built of them."""
    kernel_unsupported_reason: Callable[[str, Any, torch.dtype], str | None]
    """(kernel, config, dtype) to why the kernel cannot compute it: the end of a sentence."""


ARCHITECTURES = {
    DEFAULT: Architecture(ModelConfig, TokenFormer, pattention.kernel_unsupported_reason),
    "transformer": Architecture(
        TransformerConfig, Transformer, transformer.kernel_unsupported_reason
    ),
}


def read_config(values: Mapping[str, Any], where: str = "model") -> LanguageModelConfig:
    """The config that a `model` section describes, of a recipe or of a checkpoint.

    Args:
        values: the section; `architecture` says which kind, and may be absent.
        where: the section's name in error messages.

    Raises:
        UserError: a kind that is not there, or a section that does not fit it.
    """
    if not isinstance(values, Mapping):
        return parse_dataclass(ModelConfig, values, where)  # which refuses it
    name = values.get(KEY, DEFAULT)
    if name not in ARCHITECTURES:
        raise UserError(f"{where}.{KEY} {name!r}{suggest(str(name), list(ARCHITECTURES))}")
    _check_kind(values, name, where)
    if name == DEFAULT:
        # No field of a TokenFormer's: its files are what they were before there was another kind.
        values = {key: value for key, value in values.items() if key != KEY}
    return parse_dataclass(ARCHITECTURES[name].config, values, where)


def _check_kind(values: Mapping[str, Any], name: str, where: str) -> None:
    """Refuses a key that another kind of model has, and this one has not."""
    keys = {kind: {item.name for item in fields(it.config)} for kind, it in ARCHITECTURES.items()}
    for key in values:
        for kind in keys:
            if key != KEY and key in keys[kind] and key not in keys[name]:
                raise UserError(f"{where}.{key} is of a {kind}, and this is a {name}: leave it out")


def build_model(config: LanguageModelConfig) -> LanguageModel:
    """A new model of a config."""
    return architecture_of(config).model(config)


def architecture_of(config: LanguageModelConfig) -> Architecture:
    """The kind of model that a config describes."""
    return ARCHITECTURES[config.architecture]


def as_tokenformer(config: LanguageModelConfig, what: str) -> ModelConfig:
    """The config, if it is that of a TokenFormer.

    Args:
        config: of what was given as a source.
        what: about which it is no use, as the second half of a sentence.

    Raises:
        UserError: it is of another model.
    """
    if not isinstance(config, ModelConfig):
        raise UserError(f"source is a {config.architecture}, and {what}")
    return config
