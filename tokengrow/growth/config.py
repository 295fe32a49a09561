"""Settings of a growth."""

from dataclasses import dataclass
from typing import Literal, get_args

from tokengrow.errors import UserError

Init = Literal["zero_key", "gram", "published"]
TauRule = Literal["keep", "recompute", "anneal"]
NewBlocks = Literal["identity", "stack"]
NewBlockPlace = Literal["spread", "top"]
OptimizerRule = Literal["carry", "fresh"]

CHOICES: dict[str, tuple[str, ...]] = {
    "init": get_args(Init),
    "tau": get_args(TauRule),
    "new_blocks": get_args(NewBlocks),
    "new_block_place": get_args(NewBlockPlace),
    "optimizer": get_args(OptimizerRule),
}
"""Field of `GrowthConfig` to its valid values."""


@dataclass(frozen=True, kw_only=True)
class GrowthConfig:
    """Initialisation of new parameters and drift tolerance.

    Raises:
        UserError: a value is invalid; the message names the key.
    """

    init: Init = "zero_key"
    """Initialisation of new parameter tokens. zero_key: zero keys, random values, tau kept. gram:
    random keys that together score like the old ones, zero values, tau recomputed. published:
    random keys and values, as in a new model, which changes the function."""
    tau: TauRule = "keep"
    """tau of the grown model. keep: that of the source. recompute: sqrt(N) of the new N, which
    changes the function with zero_key. anneal: kept at the growth, then moved to sqrt(N) in
    training."""
    anneal_steps: int = 200
    """Updates after the growth over which an annealed tau² moves linearly to N."""
    new_blocks: NewBlocks = "identity"
    """Initialisation of new layers. identity: they add nothing to the residual stream. stack: exact
    copies of old blocks, which change the function."""
    new_block_place: NewBlockPlace = "spread"
    """Position of new layers: spread evenly after the old ones, or on top of all of them."""
    new_value_scale: float = 0.1
    """Standard deviation of new value tokens divided by that of the old ones. Also the size of the
    perturbation of a new block relative to the block that it copies. Must be above 0."""
    optimizer: OptimizerRule = "carry"
    """Optimizer state: carry Adam's moments, or start with a fresh optimizer."""
    new_lr_scale: float = 1.0
    """Learning rate of new entries divided by that of old ones, in the stage after the growth."""
    new_warmup_steps: int = 100
    """Updates over which the learning rate of new entries rises from 0; old entries have no such
    warm-up."""
    freeze_source: int = 0
    """Updates after the growth during which old entries and their moments are frozen; -1: the
    complete stage."""
    tolerance: float | None = None
    """Maximum drift relative to the logits; null: the drift that rounding explains."""
    seed: int = 0
    """Seed of new values and of a random probe batch; a run adds its own seed."""

    def __post_init__(self) -> None:
        for key, valid in CHOICES.items():
            if (value := getattr(self, key)) not in valid:
                raise UserError(f"growth.{key} must be one of {', '.join(valid)}, got {value!r}.")
        minima = {"anneal_steps": 1, "new_warmup_steps": 0, "freeze_source": -1}
        for key, minimum in minima.items():
            if (value := getattr(self, key)) < minimum:
                raise UserError(f"growth.{key} must be at least {minimum}, got {value}.")
        for key in ("new_value_scale", "new_lr_scale"):
            if not (value := getattr(self, key)) > 0:
                raise UserError(
                    f"growth.{key} must be above 0, got {value}. Otherwise new entries never move."
                )
        if self.tolerance is not None and self.tolerance < 0:
            raise UserError(f"growth.tolerance must be 0 or more, got {self.tolerance}.")
        if self.init == "gram" and self.tau != "recompute":
            raise UserError(
                f"growth.tau must be recompute with growth.init=gram, got {self.tau!r}, because "
                "the new keys raise the norm of the scores. Use growth=gram."
            )
