"""Small models for export, and comparisons between tensors."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokengrow.checkpoint.store import Checkpoint
from tokengrow.data.tokenizer import Tokenizer
from tokengrow.interop.hf import write_hf
from tokengrow.model.config import ModelConfig, ParameterTokens, Taus
from tokengrow.model.tokenformer import TokenFormer

VOCAB_SIZE = 300
MODEL_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "modeling_tokenformer.py",
}


def random_checkpoint(dtype: torch.dtype = torch.float32, **changes: Any) -> Checkpoint:
    """Return a checkpoint with weights so large that every part of the model affects the logits."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "context_length": 32,
        "layers": 2,
        "width": 24,
        "heads": 3,
        "head_dim": 16,  # 3 * 16 is not 24
        "tokens": ParameterTokens(query=10, key=12, value=14, output=9, ffn=30),
        "tau": Taus(query=2.0, key=3.0, value=2.5, output=1.7, ffn=4.0),
        "rotary_channels": 6,
        "norm_eps": 2e-5,
        "init": "published",
    }
    model = TokenFormer(ModelConfig(**{**sizes, **changes}))
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    for name, weight in model.named_parameters():
        weight.data *= 1 if name.startswith("final_norm") else 8
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return Checkpoint.of(model.to(dtype))


def random_ids(*shape: int) -> Tensor:
    return torch.randint(1, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(1))


def max_difference(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return (actual - expected).abs().max().item()


def export(folder: Path, source: Checkpoint) -> Path:
    """Write a checkpoint in the Hugging Face format into a new folder, and return the folder."""
    folder.mkdir()
    write_hf(folder, source)
    return folder


def equal_weights(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(tensor, second[name])
        for name, tensor in first.items()
    )


def checkpoint_with_tokenizer(tokenizer: Tokenizer) -> Checkpoint:
    texts = {"tokenizer": tokenizer.to_json(), "end_of_text": tokenizer.end_of_text_token}
    return replace(random_checkpoint(), **texts)
