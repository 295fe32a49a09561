"""What a growth lets its user choose."""

from dataclasses import dataclass

from tokengrow.errors import UserError

CHOICES = {
    "init": ("zero_key", "gram", "published"),
    "tau": ("keep", "recompute", "anneal"),
    "new_blocks": ("identity", "stack"),
    "new_block_place": ("spread", "top"),
    "optimizer": ("carry", "fresh"),
}


@dataclass(frozen=True, kw_only=True)
class GrowthConfig:
    """How new parameters are born and how exact a growth must be."""

    init: str = "zero_key"
    """New parameter tokens: zero_key (zero keys, random values; tau kept), gram (random keys that
    score as the old ones do, zero values; tau recomputed), or published (keys and values at random,
    as at the birth of a model: another function)."""
    tau: str = "keep"
    """keep that of the source, recompute sqrt(N) from more tokens (with zero_key: another
    function), or anneal: keep it, and move it there while the grown model is trained."""
    anneal_steps: int = 200
    """Updates after the growth in which tau² moves linearly to N, if annealed."""
    new_blocks: str = "identity"
    """New layers: identity (they add nothing yet), or stack (whole copies: another function)."""
    new_block_place: str = "spread"
    """Where new layers go: spread evenly behind the old ones, or on top of them all."""
    new_value_scale: float = 0.1
    """Standard deviation of new value tokens over that of the old ones, and of the difference
    between a new block and the one that it copies; never 0."""
    optimizer: str = "carry"
    """carry Adam's moments along, or begin with a fresh optimizer."""
    new_lr_scale: float = 1.0
    """Learning rate of new entries over that of the old ones, in the stage after the growth."""
    new_warmup_steps: int = 100
    """Updates over which the rate of new entries alone rises from 0 to that."""
    freeze_source: int = 0
    """Updates after the growth for which old entries, with their moments, stay as they are; -1: all
    of the stage."""
    tolerance: float | None = None
    """Largest drift allowed, relative to the logits; null: what rounding explains."""
    seed: int = 0
    """Seed of the new values and of a random probe batch; a run adds its own seed."""

    def __post_init__(self) -> None:
        for key, valid in CHOICES.items():
            if (value := getattr(self, key)) not in valid:
                raise UserError(f"growth.{key} {value!r}: valid are {', '.join(valid)}")
        for key, least in {"anneal_steps": 1, "new_warmup_steps": 0, "freeze_source": -1}.items():
            if (value := getattr(self, key)) < least:
                raise UserError(f"growth.{key} must be at least {least}, not {value}")
        for key in ("new_value_scale", "new_lr_scale"):
            if not (value := getattr(self, key)) > 0:
                raise UserError(
                    f"growth.{key} must be positive, not {value}: new entries would never move"
                )
        if self.tolerance is not None and self.tolerance < 0:
            raise UserError(f"growth.tolerance must not be negative: {self.tolerance}")
        if self.init == "gram" and self.tau != "recompute":
            raise UserError(
                f"growth.init=gram goes with growth.tau=recompute, not {self.tau}: new keys raise "
                "the norm of the scores by what tau then grows by"
            )
