"""Growth of a model without an optimizer, for the tests of this directory."""

from torch import Tensor

from tokengrow.api import grow
from tokengrow.growth.config import GrowthConfig
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import TokenFormer


def grow_model(
    model: TokenFormer,
    target: ModelConfig,
    config: GrowthConfig | None = None,
    probe: Tensor | None = None,
) -> TokenFormer:
    """Return the grown model of the public function `grow`."""
    return grow(model, target, config=config, probe=probe).model
