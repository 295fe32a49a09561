"""Settings of AdamW and of its learning rate, and the optimizer built from them."""

from dataclasses import dataclass
from typing import Literal, get_args

from tokengrow.errors import UserError
from tokengrow.model.tokenformer import LanguageModel
from tokengrow.optim.adamw import AgedAdamW

Schedule = Literal["cosine", "constant", "wsd", "neox_cosine"]
Enter = Literal["rewarm", "continue", "peak"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and the learning rate of one stage.

    Raises:
        UserError: a value is invalid; the message names the key.
    """

    lr: float = 6e-4
    """Peak learning rate."""
    min_lr: float = 6e-5
    """Learning rate at the end of a decay."""
    warmup_steps: float = 100
    """Updates over which the rate rises linearly to lr; the first update has lr / warmup_steps."""
    enter: Enter = "rewarm"
    """Start of the stage. rewarm: with a warm-up. peak: at lr, without warm-up. continue: like
    peak, with the last lr of the stage before."""
    schedule: Schedule = "cosine"
    """Schedule after the warm-up: cosine (to min_lr), constant, wsd (constant, then a linear decay
    at the end), or neox_cosine (cosine of GPT-NeoX)."""
    decay_share: float = 0.2
    """Share of the updates of the stage, at its end, over which wsd decays to min_lr."""
    decay_steps: int | None = None
    """Updates until a cosine reaches min_lr, warm-up included; null: all of the stage."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of Adam's first and second moment."""
    eps: float = 1e-8
    """Epsilon of Adam."""
    weight_decay: float = 0.1
    """Decoupled weight decay of all parameters except norms and biases."""
    grad_clip: float = 1.0
    """Maximum norm of the gradient of a global batch."""

    def __post_init__(self) -> None:
        decay_remedy = ""
        decay_steps_range = f"above warmup_steps ({self.warmup:g})"
        if self.schedule == "wsd":
            decay_steps_range = "null with schedule=wsd"
            decay_remedy = " Set optim.decay_share instead."
        # Key, whether its value is valid, the valid values, and the remedy.
        checks = (
            ("lr", self.lr > 0, "above 0", ""),
            (
                "min_lr",
                0 <= self.min_lr <= self.lr or self.schedule == "constant",
                f"between 0 and lr ({self.lr})",
                "",
            ),
            ("warmup_steps", self.warmup_steps >= 0, "0 or more", ""),
            (
                "decay_steps",
                self.decay_steps is None
                or (self.decay_steps > self.warmup and self.schedule != "wsd"),
                decay_steps_range,
                decay_remedy,
            ),
            (
                "decay_share",
                0 < self.decay_share <= 1,
                "above 0 and at most 1",
                " Use schedule=constant for no decay.",
            ),
            (
                "betas",
                len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
                "two numbers from 0 to below 1",
                "",
            ),
            ("eps", self.eps > 0, "above 0", ""),
            ("weight_decay", self.weight_decay >= 0, "0 or more", ""),
            ("grad_clip", self.grad_clip > 0, "above 0", " Use inf for no clipping."),
            (
                "schedule",
                self.schedule in get_args(Schedule),
                f"one of {', '.join(get_args(Schedule))}",
                "",
            ),
            ("enter", self.enter in get_args(Enter), f"one of {', '.join(get_args(Enter))}", ""),
        )
        for key, is_valid, valid, remedy in checks:
            if not is_valid:
                raise UserError(f"optim.{key} must be {valid}, got {getattr(self, key)!r}.{remedy}")

    @property
    def warmup(self) -> float:
        """Updates of the warm-up; 0 if the stage does not re-warm."""
        return self.warmup_steps if self.enter == "rewarm" else 0


def build_optimizer(model: LanguageModel, config: OptimConfig) -> AgedAdamW:
    """Build AdamW with two groups: matrices with weight decay, norms and biases without.

    The update is fused if the parameters are on a GPU.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return AgedAdamW(
        groups,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=parameters[0].is_cuda or None,
    )
