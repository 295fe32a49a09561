"""The models that can be trained, by name: what a config is, and what is built of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tokengrow.errors import UserError
from tokengrow.model import pattention, transformer
from tokengrow.model.config import LanguageModelConfig, ModelConfig
from tokengrow.model.tokenformer import LanguageModel, TokenFormer
from tokengrow.model.transformer import Transformer, TransformerConfig
from tokengrow.typed import nearest, typed

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
    unfit_for: Callable[[str, Any, torch.dtype], str | None]
    """(kernel, config, dtype) to why the kernel cannot compute it: the end of a sentence."""


ARCHITECTURES = {
    DEFAULT: Architecture(ModelConfig, TokenFormer, pattention.unfit_for),
    "transformer": Architecture(TransformerConfig, Transformer, transformer.unfit_for),
}


def read_config(values: Mapping[str, Any], where: str = "model") -> LanguageModelConfig:
    """The config that a `model` section describes, of a recipe or of a checkpoint.

    Args:
        values: the section; `architecture` says which kind, and may be absent.
        where: the section's name in error messages.

    Raises:
        UserError: a kind that is not there, or a section that does not fit it.
    """
    name = values.get(KEY, DEFAULT) if isinstance(values, Mapping) else DEFAULT
    if name not in ARCHITECTURES:
        raise UserError(f"{where}.{KEY} {name!r}{nearest(str(name), list(ARCHITECTURES))}")
    if name == DEFAULT and isinstance(values, Mapping):
        # No field of a TokenFormer's: its files are what they were before there was another kind.
        values = {key: value for key, value in values.items() if key != KEY}
    return typed(ARCHITECTURES[name].config, values, where)


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
