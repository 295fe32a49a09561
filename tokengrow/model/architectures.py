"""Registry of the models that can be trained: the config and the class of each architecture."""

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

ARCHITECTURE_KEY = "architecture"
"""Key of a `model` section that names the architecture."""
DEFAULT_ARCHITECTURE = "tokenformer"
"""Architecture of a `model` section without the key."""


@dataclass(frozen=True)
class Architecture:
    """Classes of one architecture."""

    config: type[LanguageModelConfig]
    """Class of the sizes."""
    model: type[LanguageModel]
    """Class of the model."""
    kernel_unsupported_reason: Callable[[str, Any, torch.dtype], str | None]
    """Function from (kernel, config, dtype) to why the kernel cannot compute the model, or None."""


ARCHITECTURES = {
    DEFAULT_ARCHITECTURE: Architecture(
        ModelConfig, TokenFormer, pattention.kernel_unsupported_reason
    ),
    "transformer": Architecture(
        TransformerConfig, Transformer, transformer.kernel_unsupported_reason
    ),
}
"""Name of an architecture to its classes."""


def read_config(values: Mapping[str, Any], where: str = "model") -> LanguageModelConfig:
    """Return the config that the `model` section of a recipe or a checkpoint describes.

    Args:
        values: the section; its `architecture` may be absent.
        where: name of the section, for error messages.

    Raises:
        UserError: the architecture is unknown, or the section does not match it.
    """
    if not isinstance(values, Mapping):
        return parse_dataclass(ModelConfig, values, where)  # raises the error
    name = values.get(ARCHITECTURE_KEY, DEFAULT_ARCHITECTURE)
    if name not in ARCHITECTURES:
        raise UserError(
            f"Unknown {where}.{ARCHITECTURE_KEY}={name}. {suggest(str(name), list(ARCHITECTURES))}"
        )
    keys = {
        other: {item.name for item in fields(architecture.config)}
        for other, architecture in ARCHITECTURES.items()
    }
    for key in values:
        for other in keys:
            if key != ARCHITECTURE_KEY and key in keys[other] and key not in keys[name]:
                raise UserError(
                    f"{where}.{key} is a key of a {other}, but the model is a {name}. "
                    "Remove the key."
                )
    if name == DEFAULT_ARCHITECTURE:
        # ModelConfig has no field for the architecture, so that its files have not changed.
        values = {key: value for key, value in values.items() if key != ARCHITECTURE_KEY}
    return parse_dataclass(ARCHITECTURES[name].config, values, where)


def build_model(config: LanguageModelConfig) -> LanguageModel:
    """Build a newly initialised model of a config."""
    return architecture_of(config).model(config)


def architecture_of(config: LanguageModelConfig) -> Architecture:
    """Return the architecture of a config."""
    return ARCHITECTURES[config.architecture]


def as_tokenformer(config: LanguageModelConfig, explanation: str) -> ModelConfig:
    """Return the config of a source unchanged, or raise `UserError` unless it is a TokenFormer.

    Args:
        config: config of the source.
        explanation: sentence that ends the message: the reason, or the remedy.
    """
    if not isinstance(config, ModelConfig):
        raise UserError(f"source must be a TokenFormer, got a {config.architecture}. {explanation}")
    return config
