"""Configuration of a training run: its stages with resolved models, and all settings."""

from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch

from tokengrow.checkpoint.schema import TokensFrom
from tokengrow.distributed.fabric import FabricConfig
from tokengrow.errors import UserError
from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.plan import plan_growth
from tokengrow.kernels.dispatch import check_kernel
from tokengrow.metrics.logger_collection import LoggerConfig
from tokengrow.model.architectures import architecture_of
from tokengrow.model.config import LanguageModelConfig
from tokengrow.optim.config import OptimConfig
from tokengrow.training.plateau import PlateauConfig

POSITIVE = (
    *("batch_size", "micro_batch_size", "validation_every", "validation_sequences"),
    *("checkpoint_every", "keep_checkpoints", "log_every"),
)
"""Keys of TrainConfig that must be at least 1."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of a ladder: a model size, its duration and its optimizer settings."""

    name: str
    """Name of the stage and of its rung."""
    steps: int
    """Optimizer updates; with a plateau, their maximum."""
    model: LanguageModelConfig
    """Model size; grown from the previous stage, so no size is smaller."""
    optim: OptimConfig
    """Optimizer settings and learning-rate schedule."""
    plateau: PlateauConfig | None = None
    """Rule that ends the stage early; null: the stage runs all its steps."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"stages.{self.name}.steps must be at least 1, got {self.steps}.")
        if self.plateau is not None and self.optim.schedule != "constant":
            raise UserError(
                f"stages.{self.name}.optim.schedule must be constant with a plateau, got "
                f"{self.optim.schedule}, which depends on the length of the stage. Set it to "
                f"constant, or remove stages.{self.name}.plateau."
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Configuration of a training run."""

    out: str
    """Directory of the run: checkpoints, logs, report."""
    stages: tuple[StageConfig, ...]
    """Stages of the ladder, smallest first."""
    seed: int = 0
    """Seed of initial weights, growths and data order."""
    batch_size: int = 64
    """Sequences per optimizer update, over all devices."""
    micro_batch_size: int = 16
    """Sequences per device and forward pass; gradients of a device's share are accumulated."""
    validation_every: int = 100
    """Updates between validations in a stage; each stage also starts and ends with one."""
    validation_sequences: int = 256
    """Sequences of the validation split to use, spread evenly over it."""
    checkpoint_every: int = 500
    """Updates between checkpoints in a stage; each stage ends with one."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep; the last one of each stage is always kept."""
    log_every: int = 10
    """Updates between logged metrics."""
    max_skipped_steps: int = 10
    """Maximum updates in a row skipped because of a non-finite gradient; one more stops the run."""
    resume: Literal["auto", "never"] = "auto"
    """auto: resume the run in `out`; never: require an empty `out`."""
    source: str | None = None
    """Checkpoint, or run, that the first stage starts from; it is grown if its size differs."""
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    """Initialisation of new parameters and drift tolerance."""
    fabric: FabricConfig = field(default_factory=FabricConfig)
    """Devices, strategy and precision."""
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    """Metric loggers."""
    kernel: str = "auto"
    """Pattention kernel; auto: triton on a GPU."""
    compile: bool | None = None
    """Whether to apply torch.compile to the blocks; null: on a GPU."""
    tokens_from: TokensFrom | None = None
    """Sections of the recipe that name the tokens, recorded for runs that continue this one."""

    def __post_init__(self) -> None:
        for key in POSITIVE:
            if getattr(self, key) < 1:
                raise UserError(f"{key} must be at least 1, got {getattr(self, key)}.")
        if self.max_skipped_steps < 0:
            raise UserError(
                f"max_skipped_steps must be at least 0, got {self.max_skipped_steps}. 0 stops the "
                "run at the first skipped update."
            )
        if not self.stages:
            raise UserError("stages is empty. Choose a recipe (recipes=quickstart) or add stages.")
        if self.batch_size % self.micro_batch_size:
            raise UserError(
                f"batch_size must be a multiple of micro_batch_size ({self.micro_batch_size}), "
                f"got {self.batch_size}. Change one of them."
            )
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be in [0, 2**63), got {self.seed}.")
        for before, after in pairwise(self.stages):
            where = f"stages.{after.name}.model"
            plan_growth(before.model, after.model, where, self.growth)
        if self.resume not in ("auto", "never"):
            raise UserError(f"resume must be one of auto, never, got {self.resume!r}.")
        check_kernel(self.kernel)

    @property
    def compiles(self) -> bool:
        """Whether torch.compile is applied to the blocks on this machine."""
        return self.fabric.on_gpu if self.compile is None else self.compile

    def check_kernel(self) -> None:
        """Raise `UserError` if the kernel cannot train these stages on this machine."""
        if self.kernel == "triton" and not self.fabric.on_gpu:
            raise UserError(
                "kernel must be auto or reference on a CPU, got 'triton', which needs a GPU."
            )
        low_precision = self.fabric.chosen_precision != "32-true"
        for stage in self.stages:
            dtype = torch.bfloat16 if low_precision else torch.float32
            architecture = architecture_of(stage.model)
            reason = architecture.kernel_unsupported_reason(self.kernel, stage.model, dtype)
            if reason:
                raise UserError(f"kernel={self.kernel} in stage {stage.name}: it {reason}")

    def check_world_size(self, world_size: int) -> None:
        """Raise `UserError` unless every process gets the same number of micro-batches."""
        sequences = self.micro_batch_size * world_size
        if self.batch_size % sequences:
            raise UserError(
                f"batch_size must be a multiple of micro_batch_size x processes "
                f"({self.micro_batch_size} x {world_size}), got {self.batch_size}. Change one of "
                "them."
            )

    @property
    def min_vocab_size(self) -> int:
        """Size of the smallest vocabulary among the models."""
        return min(stage.model.vocab_size for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain values, with stages by name, as a checkpoint records them."""
        values = asdict(self)
        values["stages"] = {stage["name"]: stage for stage in values["stages"]}
        return values
