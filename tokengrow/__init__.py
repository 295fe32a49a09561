"""tokengrow: train a small TokenFormer, grow it exactly, go on training."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokengrow.checkpoint.store import load_checkpoint, save_checkpoint
    from tokengrow.growth.engine import grow
    from tokengrow.model.config import ModelConfig
    from tokengrow.model.tokenformer import TokenFormer

__version__ = "0.1.0"

__all__ = ["ModelConfig", "TokenFormer", "grow", "load_checkpoint", "save_checkpoint"]

# Resolved on first use: `tokengrow --help` and a mistyped key should not wait for torch.
_HOMES = {
    "ModelConfig": "tokengrow.model.config",
    "TokenFormer": "tokengrow.model.tokenformer",
    "grow": "tokengrow.growth.engine",
    "load_checkpoint": "tokengrow.checkpoint.store",
    "save_checkpoint": "tokengrow.checkpoint.store",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'tokengrow' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
