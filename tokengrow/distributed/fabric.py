"""Lightning Fabric from config."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers.logger import Logger

from tokengrow.errors import UserError

PRECISIONS = ("auto", "32-true", "bf16-mixed", "bf16-true")


@dataclass(frozen=True, kw_only=True)
class FabricConfig:
    """Which devices a run uses, and in which precision."""

    accelerator: str = "auto"
    """auto (a GPU if there is one), cpu, or cuda."""
    precision: str = "auto"
    """auto (bf16-mixed on a GPU, else 32-true), 32-true, bf16-mixed or bf16-true."""

    def __post_init__(self) -> None:
        for key, valid in (("accelerator", ("auto", "cpu", "cuda")), ("precision", PRECISIONS)):
            if getattr(self, key) not in valid:
                raise UserError(
                    f"fabric.{key} {getattr(self, key)!r}: valid are {', '.join(valid)}"
                )

    @property
    def on_gpu(self) -> bool:
        """Whether the run will be on a GPU."""
        return self.accelerator != "cpu" and torch.cuda.is_available()

    @property
    def chosen_precision(self) -> str:
        """The precision, with auto resolved."""
        if self.precision != "auto":
            return self.precision
        return "bf16-mixed" if self.on_gpu else "32-true"


def build_fabric(config: FabricConfig, loggers: Sequence[Logger] = ()) -> Fabric:
    """A launched Fabric on one device.

    Raises:
        UserError: a GPU that is not there, or a launcher of several processes.
    """
    if config.accelerator == "cuda" and not torch.cuda.is_available():
        raise UserError("fabric.accelerator=cuda: no GPU is visible; set fabric=cpu")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: a run takes one device so far; "
            "start it without torchrun or srun"
        )
    # Its notes on precision and tensor cores would break into the progress display at every stage.
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    fabric = Fabric(
        accelerator="cuda" if config.on_gpu else "cpu",
        devices=1,
        precision=config.chosen_precision,  # type: ignore[arg-type]  # Lightning: a Literal
        loggers=list(loggers),
    )
    fabric.launch()
    return fabric


def release(fabric: Fabric, module: Any) -> None:
    """Lets go of a LightningModule, so that its memory is free once nobody else holds it.

    Fabric keeps every one that it sets up among its callbacks, and has no door out for it.

    Args:
        fabric: that set it up.
        module: as `setup_module` gave it back.
    """
    kept = fabric._callbacks
    kept[:] = [callback for callback in kept if callback is not module._original_module]
