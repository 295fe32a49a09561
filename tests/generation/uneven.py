"""A model whose every size and tau is another number, so that a mix-up of two of them shows."""

from typing import Any

import torch
from torch import Tensor

from tokengrow.model.config import ModelConfig, ParameterTokens, Taus
from tokengrow.model.tokenformer import TokenFormer

VOCAB = 50


def uneven_model(dtype: torch.dtype = torch.float32, **changes: Any) -> TokenFormer:
    """Of unequal parameter tokens and taus; its logits have a spread of about 4."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "context_length": 16,
        "layers": 3,
        "width": 16,
        "heads": 2,
        "head_dim": 12,
        "tokens": ParameterTokens(query=12, key=11, value=13, output=10, ffn=24),
        "tau": Taus(query=3.0, key=2.5, ffn=6.0),
        "init": "published",
    }
    built = TokenFormer(ModelConfig(**{**sizes, **changes})).eval()
    built.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        built.embedding.weight.mul_(50)
    return built.to(dtype)


def random_ids(*shape: int, seed: int = 1) -> Tensor:
    """Token ids that it knows."""
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))
