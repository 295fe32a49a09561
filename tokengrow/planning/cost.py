"""Cost of a run, a growth or a model, computed from its sizes without building it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tokengrow.growth.plan import AXES, GrowthPlan, GrowthStep, plan_growth
from tokengrow.model.config import LanguageModelConfig
from tokengrow.planning.memory import TrainingMemory, checkpoint_bytes, training_memory
from tokengrow.training.config import StageConfig, TrainConfig

SCRATCH_TOKENS = 300_000_000_000
"""Training tokens of each of the four published models from scratch: 300 billion tokens of the Pile
(TokenFormer, arXiv 2410.23168)."""

SECONDS_PER_HOUR = 3600


@dataclass(frozen=True, kw_only=True)
class SizeChange:
    """Sizes before and after one step of a growth."""

    axis: str
    """Growth axis."""
    before: dict[str, Any]
    """Model config keys of the axis, with their values before the step."""
    after: dict[str, Any]
    """The same keys, with their values after the step."""

    @classmethod
    def from_step(cls, step: GrowthStep) -> "SizeChange":
        """Return the sizes along the axis of one step of a growth plan."""
        before, after = step.source.to_dict(), step.target.to_dict()
        keys = AXES[step.axis]
        return cls(
            axis=step.axis,
            before={key: before[key] for key in keys},
            after={key: after[key] for key in keys},
        )


@dataclass(frozen=True, kw_only=True)
class StageBudget:
    """Cost of training one rung."""

    steps: int
    """Number of optimizer updates; a maximum if `may_end_before` is true."""
    may_end_before: bool
    """Whether a plateau of the validation loss can end the stage earlier."""
    tokens: int
    """Training tokens: steps × sequences per update × their length."""
    flops: int
    """Training FLOPs of this stage."""
    cumulative_flops: int
    """Training FLOPs of this stage and of those before it in the run."""
    of_scratch: float
    """cumulative_flops divided by scratch_flops of the rung."""
    flops_per_second: float | None
    """Throughput, FLOP/s, given or measured; null: unknown."""
    hours: float | None
    """Training time, h: flops / flops_per_second / 3600; null: unknown."""


@dataclass(frozen=True, kw_only=True)
class RungBudget:
    """One size, the growth that leads to it, and the cost of training it."""

    name: str
    """Name of the stage; without stages, `model`, `source` or `grown`."""
    appended: tuple[SizeChange, ...]
    """Growth to this size, axis by axis; empty: no growth."""
    parameters: int
    """Number of parameters; a tied embedding counts once."""
    flops_per_token: int
    """Training FLOPs per token, forward and backward."""
    scratch_flops: int
    """FLOPs of training this size from scratch on `SCRATCH_TOKENS`."""
    checkpoint_bytes: int
    """Size of a checkpoint on disk, bytes: weights and Adam's moments."""
    memory: TrainingMemory
    """Memory of a training step on the device."""
    stage: StageBudget | None = None
    """Training of this rung; null: no stage trains it."""


@dataclass(frozen=True, kw_only=True)
class TotalBudget:
    """Sum over the stages of a run."""

    steps: int
    """Number of optimizer updates."""
    tokens: int
    """Training tokens."""
    flops: int
    """Training FLOPs."""
    hours: float | None
    """Training time, h; null: no FLOP/s were given or measured."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Numbers of a plan."""

    precision: str
    """Precision for which memory is counted."""
    micro_batch_size: int
    """Sequences whose activations are counted."""
    device: str | None = None
    """Device on which FLOP/s were measured; null: not measured."""
    scratch_tokens: int = SCRATCH_TOKENS
    """Training tokens assumed by scratch_flops."""
    rungs: tuple[RungBudget, ...]
    """Sizes, smallest first."""
    total: TotalBudget | None = None
    """Sum over the stages; null: no stages."""

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as nested plain values."""
        return asdict(self)


def run_budget(
    run: TrainConfig,
    source: LanguageModelConfig | None = None,
    flops_per_second: Mapping[str, float] | None = None,
    device: str | None = None,
) -> Budget:
    """Return the budget of all stages of a run.

    Args:
        run: run with its stages, batch size and precision.
        source: size of the checkpoint that the run starts from; its training is not counted.
        flops_per_second: stage name to FLOP/s; None: unknown.
        device: device on which they were measured; None: not measured.
    """
    batch, precision = run.micro_batch_size, run.fabric.chosen_precision
    rungs: list[RungBudget] = []
    stages: list[StageBudget] = []
    previous = source
    for stage in run.stages:
        growth = plan_growth(previous, stage.model, config=run.growth) if previous else None
        throughput = flops_per_second[stage.name] if flops_per_second else None
        stages.append(_stage_budget(run, stage, sum(done.flops for done in stages), throughput))
        memory = training_memory(stage.model, batch, precision, run.kernel)
        rungs.append(_rung_budget(stage.name, stage.model, precision, memory, growth, stages[-1]))
        previous = stage.model
    total = TotalBudget(
        steps=sum(stage.steps for stage in stages),
        tokens=sum(stage.tokens for stage in stages),
        flops=stages[-1].cumulative_flops,
        hours=sum(stage.hours or 0.0 for stage in stages) if flops_per_second else None,
    )
    return Budget(
        precision=precision,
        micro_batch_size=batch,
        device=device,
        rungs=tuple(rungs),
        total=total,
    )


def growth_budget(growth: GrowthPlan, micro_batch_size: int, precision: str) -> Budget:
    """Return the budget of both sizes of a growth, or only of the source if nothing changes.

    Args:
        growth: plan of the growth.
        micro_batch_size: sequences whose activations are counted.
        precision: 32-true, bf16-mixed or bf16-true.
    """
    source, grown = (
        training_memory(model, micro_batch_size, precision)
        for model in (growth.source, growth.target)
    )
    rungs = [_rung_budget("source", growth.source, precision, source)]
    if growth.steps:
        rungs.append(_rung_budget("grown", growth.target, precision, grown, growth))
    return Budget(precision=precision, micro_batch_size=micro_batch_size, rungs=tuple(rungs))


def model_budget(model: LanguageModelConfig, micro_batch_size: int, precision: str) -> Budget:
    """Return the budget of one size.

    Args:
        model: config of the model.
        micro_batch_size: sequences whose activations are counted.
        precision: 32-true, bf16-mixed or bf16-true.
    """
    memory = training_memory(model, micro_batch_size, precision)
    rung = _rung_budget("model", model, precision, memory)
    return Budget(precision=precision, micro_batch_size=micro_batch_size, rungs=(rung,))


def _rung_budget(
    name: str,
    model: LanguageModelConfig,
    precision: str,
    memory: TrainingMemory,
    growth: GrowthPlan | None = None,
    stage: StageBudget | None = None,
) -> RungBudget:
    """Return the budget of one size."""
    return RungBudget(
        name=name,
        appended=tuple(map(SizeChange.from_step, growth.steps)) if growth else (),
        parameters=model.num_parameters(),
        flops_per_token=model.flops_per_token(),
        scratch_flops=_scratch_flops(model),
        checkpoint_bytes=checkpoint_bytes(model, precision),
        memory=memory,
        stage=stage,
    )


def _stage_budget(
    run: TrainConfig, stage: StageConfig, flops_before: int, throughput: float | None
) -> StageBudget:
    """Return the budget of one stage."""
    tokens = stage.steps * run.batch_size * stage.model.context_length
    flops = tokens * stage.model.flops_per_token()
    return StageBudget(
        steps=stage.steps,
        may_end_before=stage.plateau is not None,
        tokens=tokens,
        flops=flops,
        cumulative_flops=flops_before + flops,
        of_scratch=(flops_before + flops) / _scratch_flops(stage.model),
        flops_per_second=throughput,
        hours=None if throughput is None else flops / throughput / SECONDS_PER_HOUR,
    )


def _scratch_flops(model: LanguageModelConfig) -> int:
    """Return the FLOPs of training from scratch on `SCRATCH_TOKENS`."""
    return SCRATCH_TOKENS * model.flops_per_token()
