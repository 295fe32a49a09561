"""What a growth lets its user choose."""

from dataclasses import dataclass

from tokengrow.errors import UserError

CHOICES = {
    "init": ("zero_key", "published"),
    "tau": ("keep", "recompute"),
    "optimizer": ("carry", "fresh"),
}


@dataclass(frozen=True, kw_only=True)
class GrowthConfig:
    """How new parameters are born and how exact a growth must be."""

    init: str = "zero_key"
    """New parameter tokens: zero_key (the function stays), or published (keys and values at random,
    as at the birth of a model: another function)."""
    tau: str = "keep"
    """keep that of the source, or recompute sqrt(N) from more tokens: another function."""
    optimizer: str = "carry"
    """carry Adam's moments along, or begin with a fresh optimizer."""
    new_value_scale: float = 0.1
    """Standard deviation of new value tokens over that of the old ones, and of the difference
    between a new block and the one that it copies; never 0."""
    tolerance: float | None = None
    """Largest drift allowed, relative to the logits; null: what rounding explains."""
    seed: int = 0
    """Seed of the new values and of a random probe batch; a run adds its own seed."""

    def __post_init__(self) -> None:
        for key, valid in CHOICES.items():
            if (value := getattr(self, key)) not in valid:
                raise UserError(f"growth.{key} {value!r}: valid are {', '.join(valid)}")
        if not self.new_value_scale > 0:
            raise UserError(
                f"growth.new_value_scale must be positive, not {self.new_value_scale}: new keys "
                "are zero, and keys and values both zero would never move"
            )
        if self.tolerance is not None and self.tolerance < 0:
            raise UserError(f"growth.tolerance must not be negative: {self.tolerance}")

    def check_axes(self, axes: list[str]) -> None:
        """Refuses axes that the published code has no growth for, where its growth is wanted."""
        others = [axis for axis in axes if axis != "tokens"]
        if self.init == "published" and others:
            raise UserError(
                f"growth.init=published grows parameter tokens alone, as the published code does, "
                f"and not {', '.join(others)}: take growth=zero_key"
            )
