"""What a run is, typed: its stages with their resolved models, and everything around them."""

from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch

from tokengrow.distributed.fabric import FabricConfig
from tokengrow.errors import UserError
from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.plan import plan_growth
from tokengrow.metrics.run_log import LoggerConfig
from tokengrow.model.architectures import architecture_of
from tokengrow.model.config import LanguageModelConfig
from tokengrow.model.pattention import KERNELS
from tokengrow.optim.config import OptimConfig
from tokengrow.training.plateau import PlateauConfig


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One entry of a ladder: a size, and how long and how it trains."""

    name: str
    """Of the stage and its rung."""
    steps: int
    """Optimizer updates; with a plateau, at most."""
    model: LanguageModelConfig
    """The size trained; grown from the stage before, nowhere smaller."""
    optim: OptimConfig
    """AdamW and the learning rate of this stage."""
    plateau: PlateauConfig | None = None
    """When the stage ends before its steps; null: never."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"stages.{self.name}.steps must be at least 1, not {self.steps}")
        if self.plateau is not None and self.optim.schedule != "constant":
            raise UserError(
                f"stages.{self.name}.plateau needs optim.schedule: constant, not "
                f"{self.optim.schedule}, which has to know where the stage ends: set "
                f"stages.{self.name}.optim.schedule=constant, or leave the plateau out"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run: stages, data order, where it writes."""

    out: str
    """Folder of the run: checkpoints, logs, plots."""
    stages: tuple[StageConfig, ...]
    """The ladder, smallest first."""
    seed: int = 0
    """Of the initial weights, the growths and the order of the data."""
    batch_size: int = 64
    """Sequences in an optimizer update, over all devices."""
    micro_batch_size: int = 16
    """Sequences that one device takes at once; the rest of its share is accumulated."""
    validation_every: int = 100
    """Updates between validations within a stage; each stage also begins and ends with one."""
    validation_sequences: int = 256
    """How many sequences of the validation split are used, spread evenly over it."""
    checkpoint_every: int = 500
    """Updates between checkpoints within a stage; each stage ends with one."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; the last of each stage is always kept."""
    log_every: int = 10
    """Updates between logged metrics."""
    max_skipped_steps: int = 10
    """Updates in a row that are skipped because their gradient is not finite; one more stops."""
    resume: str = "auto"
    """auto: go on where `out` stands; never: refuse an `out` that holds something."""
    source: str | None = None
    """Checkpoint (or run) from which the first stage starts, growing it if its size differs."""
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    """How new parameters are born."""
    fabric: FabricConfig = field(default_factory=FabricConfig)
    """Devices and precision."""
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    """Where metrics go."""
    kernel: str = "auto"
    """How Pattention is computed: auto (triton on a GPU), naive, compiled, triton or fp8."""
    compile: bool | None = None
    """Whether torch.compile takes the blocks; null: on a GPU."""
    tokens_from: dict[str, Any] = field(default_factory=dict)
    """The recipe's data, tokenizer and store, recorded for a run that goes on from here."""

    def __post_init__(self) -> None:
        for key in (
            "batch_size",
            "micro_batch_size",
            "validation_every",
            "validation_sequences",
            "checkpoint_every",
            "keep_checkpoints",
            "log_every",
        ):
            if getattr(self, key) < 1:
                raise UserError(f"{key} must be at least 1, not {getattr(self, key)}")
        if self.max_skipped_steps < 0:
            raise UserError(
                f"max_skipped_steps must be at least 0, which stops at the first, not "
                f"{self.max_skipped_steps}"
            )
        if not self.stages:
            raise UserError("stages is empty: choose a recipe (recipes=quickstart) or add stages")
        if self.batch_size % self.micro_batch_size:
            raise UserError(
                f"batch_size ({self.batch_size}) is not a multiple of micro_batch_size "
                f"({self.micro_batch_size}): change one of them"
            )
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed must lie in [0, 2**63), not {self.seed}")
        for before, after in pairwise(self.stages):
            where = f"stages.{after.name}.model"
            plan_growth(before.model, after.model, where, self.growth)
        if self.resume not in ("auto", "never"):
            raise UserError(f"resume {self.resume!r}: valid are auto, never")
        if self.kernel not in KERNELS:
            raise UserError(f"kernel {self.kernel!r}: valid are {', '.join(KERNELS)}")

    @property
    def compiles(self) -> bool:
        """Whether the blocks will be compiled here."""
        return self.fabric.on_gpu if self.compile is None else self.compile

    def check_kernel(self) -> None:
        """Refuses a kernel that cannot train these stages here."""
        if self.kernel == "triton" and not self.fabric.on_gpu:
            raise UserError(
                "kernel=triton needs a GPU, and this run is on the CPU: set kernel=auto or naive"
            )
        narrow = self.fabric.chosen_precision != "32-true"
        for stage in self.stages:
            dtype = torch.bfloat16 if narrow else torch.float32
            kernel_unsupported_reason = architecture_of(stage.model).kernel_unsupported_reason
            if problem := kernel_unsupported_reason(self.kernel, stage.model, dtype):
                raise UserError(f"kernel={self.kernel} in stage {stage.name}: it {problem}")

    def check_share(self, world_size: int) -> None:
        """Refuses a batch that is no whole number of micro-batches for each process."""
        at_once = self.micro_batch_size * world_size
        if self.batch_size % at_once:
            raise UserError(
                f"batch_size ({self.batch_size}) is not a multiple of micro_batch_size x processes "
                f"({self.micro_batch_size} x {world_size}): change one of them"
            )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuses a tokenizer with more entries than a stage's model has rows for."""
        room = min(stage.model.vocab_size for stage in self.stages)
        if vocab_size > room:
            raise UserError(
                f"the tokenizer's vocabulary ({vocab_size}) does not fit model.vocab_size "
                f"({room}): set model.vocab_size={vocab_size} or more, or take a smaller "
                "tokenizer"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, stages by name: what a checkpoint keeps of its recipe."""
        values = asdict(self)
        values["stages"] = {stage["name"]: stage for stage in values["stages"]}
        return values
