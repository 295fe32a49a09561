"""tokengrow: train a small TokenFormer, grow it exactly, keep training."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokengrow.api import build_optimizer, grow, perplexity
    from tokengrow.checkpoint.store import load_checkpoint, save_checkpoint
    from tokengrow.data.loader import train_loader
    from tokengrow.data.store import TokenStore, build_store
    from tokengrow.generation.sampling import generate
    from tokengrow.growth.plan import plan_growth
    from tokengrow.model.config import ModelConfig, ParameterTokens
    from tokengrow.model.pattention import Pattention
    from tokengrow.model.tokenformer import TokenFormer
    from tokengrow.training.config import TrainConfig
    from tokengrow.training.trainer import fit

__version__ = "0.1.0"

__all__ = [
    "ModelConfig",
    "ParameterTokens",
    "Pattention",
    "TokenFormer",
    "TokenStore",
    "TrainConfig",
    "build_optimizer",
    "build_store",
    "fit",
    "generate",
    "grow",
    "load_checkpoint",
    "perplexity",
    "plan_growth",
    "save_checkpoint",
    "train_loader",
]

# Imported on first use, so that `tokengrow --help` does not wait for torch.
_MODULES = {
    "ModelConfig": "tokengrow.model.config",
    "ParameterTokens": "tokengrow.model.config",
    "Pattention": "tokengrow.model.pattention",
    "TokenFormer": "tokengrow.model.tokenformer",
    "TokenStore": "tokengrow.data.store",
    "TrainConfig": "tokengrow.training.config",
    "build_optimizer": "tokengrow.api",
    "build_store": "tokengrow.data.store",
    "fit": "tokengrow.training.trainer",
    "generate": "tokengrow.generation.sampling",
    "grow": "tokengrow.api",
    "load_checkpoint": "tokengrow.checkpoint.store",
    "perplexity": "tokengrow.api",
    "plan_growth": "tokengrow.growth.plan",
    "save_checkpoint": "tokengrow.checkpoint.store",
    "train_loader": "tokengrow.data.loader",
}
"""Public name to the module that defines it."""


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'tokengrow' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
