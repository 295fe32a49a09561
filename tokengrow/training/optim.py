"""AdamW, its settings, its parameter groups, and its state as flat named tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokengrow.errors import UserError
from tokengrow.model.tokenformer import TokenFormer

SCHEDULES = ("cosine", "constant", "wsd", "neox_cosine")
ENTRIES = ("rewarm", "continue", "peak")
SLOTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and the learning rate of one stage."""

    lr: float = 6e-4
    """Peak learning rate."""
    min_lr: float = 6e-5
    """Learning rate at which a decay ends."""
    warmup_steps: float = 100
    """Updates over which the rate rises linearly to lr; the first update has lr / warmup_steps."""
    enter: str = "rewarm"
    """rewarm; peak: at lr, no warm-up; continue: likewise, lr being that of the stage before."""
    schedule: str = "cosine"
    """Then: cosine (down to min_lr), constant, wsd (linearly down at the end), or neox_cosine."""
    decay_share: float = 0.2
    """Share of the stage's updates, its last ones, over which wsd goes down to min_lr."""
    decay_steps: int | None = None
    """Updates after which a cosine has reached min_lr, warm-up included; null: all of the stage."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of Adam's first and second moment."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.1
    """Decoupled decay of everything but the final norm."""
    grad_clip: float = 1.0
    """Largest norm of the gradient of a global batch."""

    def __post_init__(self) -> None:
        checks = {
            "lr": self.lr > 0,
            "min_lr": 0 <= self.min_lr <= self.lr or self.schedule == "constant",
            "warmup_steps": self.warmup_steps >= 0,
            "decay_steps": self.decay_steps is None
            or (self.decay_steps > self.warmup and self.schedule != "wsd"),
            "decay_share": 0 < self.decay_share <= 1,
            "betas": len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "eps": self.eps > 0,
            "weight_decay": self.weight_decay >= 0,
            "grad_clip": self.grad_clip > 0,
            "schedule": self.schedule in SCHEDULES,
            "enter": self.enter in ENTRIES,
        }
        for key, holds in checks.items():
            if not holds:
                reason = {"schedule": f": valid are {', '.join(SCHEDULES)}"}
                reason["enter"] = f": valid are {', '.join(ENTRIES)}"
                reason["min_lr"] = f": it must lie between 0 and lr ({self.lr})"
                reason["decay_steps"] = f": it must exceed warmup_steps ({self.warmup:g})"
                if self.schedule == "wsd":
                    reason["decay_steps"] = ": with schedule wsd give decay_share, and null here"
                raise UserError(
                    f"optim.{key} cannot be {getattr(self, key)!r}{reason.get(key, '')}"
                )

    @property
    def warmup(self) -> float:
        """Updates of the warm-up: none where the stage does not re-warm."""
        return self.warmup_steps if self.enter == "rewarm" else 0


def decays(name: str) -> bool:
    """Whether weight decay applies to a parameter: to all but the final norm, as published."""
    return not name.startswith("final_norm.")


def build_optimizer(model: TokenFormer, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over two groups, decayed and not; fused where the parameters are on a GPU."""
    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if decays(name)], "weight_decay": config.weight_decay},
        {"params": [p for name, p in named if not decays(name)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=named[0][1].is_cuda or None,
    )


def optimizer_state(model: TokenFormer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's state as `{slot}.{parameter name}` to a CPU tensor; empty before the first update."""
    return {
        f"{slot}.{name}": optimizer.state[parameter][slot].detach().cpu()
        for name, parameter in model.named_parameters()
        for slot in SLOTS
        if parameter in optimizer.state
    }


def load_optimizer_state(
    model: TokenFormer, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]
) -> None:
    """Puts back what `optimizer_state` gave.

    Raises:
        UserError: a tensor that is missing or of another shape.
    """
    if not state:
        return
    names = {parameter: name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for slot in SLOTS[1:]:
            moment = state.get(f"{slot}.{name}")
            if moment is not None and moment.shape != parameter.shape:
                raise UserError(
                    f"the optimizer state's {slot}.{name} is {list(moment.shape)}, the parameter "
                    f"{list(parameter.shape)}: it is of another model"
                )
    full = optimizer.state_dict()
    order = [names[p] for group in optimizer.param_groups for p in group["params"]]
    try:
        # Cloned: AdamW updates its state in place, and the caller's tensors are not ours to change.
        full["state"] = {
            index: {slot: state[f"{slot}.{name}"].clone() for slot in SLOTS}
            for index, name in enumerate(order)
        }
    except KeyError as error:
        raise UserError(f"the optimizer state lacks {error}: it is of another model") from None
    optimizer.load_state_dict(full)
