"""The published model A and its figures, under our names."""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tokengrow.model.config import ModelConfig, Tokens
from tokengrow.model.tokenformer import TokenFormer

GOLDEN = Path(__file__).parents[1] / "golden"
LAYERS = 3


def our_name(official: str) -> str:
    """`sequential.2.attention.proj.key_param_tokens` to `blocks.0.attention.output.key_...`."""
    _, index, rest = official.split(".", 2)
    if rest.startswith("word_embeddings."):
        return rest.replace("word_embeddings", "embedding")
    if rest.startswith("norm."):
        return f"final_{rest}"
    rest = rest.replace("attention.proj", "attention.output").replace("mlp", "ffn")
    return f"blocks.{int(index) - 2}.{rest}"


@pytest.fixture(scope="session")
def published_config() -> ModelConfig:
    """Of model A; see tests/golden/A_tiny_init/config.json."""
    return ModelConfig(
        vocab_size=512,
        context_length=32,
        layers=LAYERS,
        width=64,
        heads=4,
        tokens=Tokens(query=48, key=48, value=48, output=40, ffn=160),
        init="published",
    )


@pytest.fixture(scope="session")
def published_weights() -> dict[str, Tensor]:
    """Of model A, by our names."""
    official = load_file(GOLDEN / "A_tiny_init" / "model.safetensors")
    return {our_name(name): tensor for name, tensor in official.items()}


@pytest.fixture(scope="session")
def published_figures() -> dict[str, Tensor]:
    """What model A computes; `grad.*` by our names, all else as in the file."""
    figures = load_file(GOLDEN / "A_tiny_init" / "l2_norm_gelu.safetensors")
    return {
        f"grad.{our_name(name.removeprefix('grad.'))}" if name.startswith("grad.") else name: value
        for name, value in figures.items()
    }


@pytest.fixture(scope="session")
def published_decoding() -> dict[str, Tensor]:
    """What model A computes with its KV cache."""
    return load_file(GOLDEN / "D_decode_l2_norm_gelu.safetensors")


@pytest.fixture
def published_model(
    published_config: ModelConfig, published_weights: dict[str, Tensor]
) -> TokenFormer:
    """Model A in float32."""
    return TokenFormer.from_weights(published_config, published_weights)
