"""Composed Hydra configs as plain values."""

from typing import Any

from omegaconf import DictConfig, OmegaConf


def plain_values(config: DictConfig) -> dict[str, Any]:
    """Return a composed config as nested plain values, with interpolations resolved."""
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
