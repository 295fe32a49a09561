"""Fixtures of growth tests: random models without zeros, so that no mistake can hide in them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tokengrow.model.config import ModelConfig, ParameterTokens
from tokengrow.model.tokenformer import TokenFormer

RandomModel = Callable[..., TokenFormer]


def _random_model(
    config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float64, spread: float = 3.0
) -> TokenFormer:
    """Return a model whose logits have about the given standard deviation."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: torch.Tensor, std: float, mean: float = 0.0) -> torch.Tensor:
        return torch.randn(like.shape, dtype=torch.float64, generator=generator) * std + mean

    weights = {}
    for name, tensor in TokenFormer(config).state_dict().items():
        if name == "final_norm.weight":
            weights[name] = normal(tensor, 0.3, 1.0)
        elif name == "final_norm.bias":
            weights[name] = normal(tensor, 0.2)
        elif name == "embedding.weight":
            weights[name] = normal(tensor, spread / config.width**0.5)
        elif name.endswith("key_param_tokens"):
            weights[name] = normal(tensor, tensor.shape[1] ** -0.5)
        else:
            weights[name] = normal(tensor, 0.5)
    return TokenFormer.from_weights(config, weights, dtype)


@pytest.fixture(scope="session")
def random_model() -> RandomModel:
    """Return `random_model(config, seed, dtype, spread)`, with logits of about that std."""
    return _random_model


@pytest.fixture(scope="session")
def sized() -> Callable[..., ModelConfig]:
    """Return `sized(n, **changes)`: two layers of width 16, n parameter tokens (2 n in FFN)."""

    def build(n: int, **changes: Any) -> ModelConfig:
        sizes: dict[str, Any] = {
            "vocab_size": 40,
            "context_length": 12,
            "layers": 2,
            "width": 16,
            "heads": 2,
            "tokens": ParameterTokens(query=n, key=n, value=n, output=n, ffn=2 * n),
        }
        return ModelConfig(**{**sizes, **changes})

    return build
