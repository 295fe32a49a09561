"""What a run or a growth will take, in numbers: what `tokengrow plan` shows. Nothing is built."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tokengrow.growth.plan import AXES, GrowthPlan, GrowthStep, plan_growth
from tokengrow.model.config import LanguageModelConfig
from tokengrow.planning.memory import Memory, checkpoint_bytes, training_memory
from tokengrow.training.config import StageConfig, TrainConfig

SCRATCH_TOKENS = 300_000_000_000
"""On which each of the four published models was trained from scratch: 300 billion tokens of the
Pile (TokenFormer, arXiv 2410.23168)."""

SECONDS_PER_HOUR = 3600


@dataclass(frozen=True, kw_only=True)
class Appended:
    """What one step of a growth changes."""

    axis: str
    """Growth axis."""
    before: dict[str, Any]
    """The axis's keys of the model's config, as they were."""
    after: dict[str, Any]
    """The same keys in the grown model."""

    @classmethod
    def of(cls, step: GrowthStep) -> "Appended":
        """The sizes along the axis of one step of a growth plan."""
        before, after = step.source.to_dict(), step.target.to_dict()
        keys = AXES[step.axis]
        return cls(
            axis=step.axis,
            before={key: before[key] for key in keys},
            after={key: after[key] for key in keys},
        )


@dataclass(frozen=True, kw_only=True)
class StageBudget:
    """What training one rung takes."""

    steps: int
    """Optimizer updates, or the most of them."""
    may_end_before: bool
    """Whether a plateau of the validation loss may end the stage sooner."""
    tokens: int
    """Steps, times sequences in an update, times their length."""
    flops: int
    """Of this stage."""
    cumulative_flops: int
    """Of this stage and those before it in the run."""
    of_scratch: float
    """cumulative_flops / scratch_flops of the rung."""
    flops_per_second: float | None
    """Given or measured; null: neither."""
    hours: float | None
    """flops / flops_per_second / 3600."""


@dataclass(frozen=True, kw_only=True)
class RungBudget:
    """One size, how it is reached, and what training it takes."""

    name: str
    """Of the stage, or of the model's part in a growth."""
    appended: tuple[Appended, ...]
    """The growth that leads here, axis by axis; empty: none."""
    parameters: int
    """A tied embedding counted once."""
    flops_per_token: int
    """Forward and backward."""
    scratch_flops: int
    """Of this size trained from scratch on `SCRATCH_TOKENS`."""
    checkpoint_bytes: int
    """On the disk: weights and Adam's moments."""
    memory: Memory
    """Bytes on the device."""
    stage: StageBudget | None = None
    """null: no stage trains it."""


@dataclass(frozen=True, kw_only=True)
class Total:
    """The sum over a run's stages."""

    steps: int
    """Optimizer updates."""
    tokens: int
    """Trained on."""
    flops: int
    """Of all stages."""
    hours: float | None
    """null: no FLOP/s were given or measured."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The numbers of a plan."""

    precision: str
    """In which the memory is counted."""
    micro_batch_size: int
    """Sequences whose activations are counted."""
    device: str | None = None
    """On which FLOP/s were measured; null: they were not."""
    scratch_tokens: int = SCRATCH_TOKENS
    """Behind every scratch_flops."""
    rungs: tuple[RungBudget, ...]
    """Smallest first."""
    total: Total | None = None
    """null: no stages."""

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict."""
        return asdict(self)


def run_budget(
    run: TrainConfig,
    source: LanguageModelConfig | None = None,
    flops_per_second: Mapping[str, float] | None = None,
    device: str | None = None,
) -> Budget:
    """The budget of a ladder.

    Args:
        run: its stages, batch size and precision.
        source: size of the checkpoint that the run starts from; its own training does not count.
        flops_per_second: stage name to FLOP/s.
        device: on which they were measured.
    """
    batch, precision = run.micro_batch_size, run.fabric.chosen_precision
    rungs: list[RungBudget] = []
    stages: list[StageBudget] = []
    previous = source
    for stage in run.stages:
        growth = plan_growth(previous, stage.model, config=run.growth) if previous else None
        speed = flops_per_second[stage.name] if flops_per_second else None
        stages.append(_stage(run, stage, sum(done.flops for done in stages), speed))
        memory = training_memory(stage.model, batch, precision, run.kernel)
        rungs.append(_rung(stage.name, stage.model, precision, memory, growth, stages[-1]))
        previous = stage.model
    total = Total(
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
    """The budget of the two sizes of a growth; of one that changes nothing, its source alone.

    Args:
        growth: from the source to the grown model.
        micro_batch_size: sequences whose activations are counted.
        precision: 32-true, bf16-mixed or bf16-true.
    """
    source, grown = (
        training_memory(model, micro_batch_size, precision)
        for model in (growth.source, growth.target)
    )
    rungs = [_rung("source", growth.source, precision, source)]
    if growth.steps:
        rungs.append(_rung("grown", growth.target, precision, grown, growth))
    return Budget(precision=precision, micro_batch_size=micro_batch_size, rungs=tuple(rungs))


def model_budget(model: LanguageModelConfig, micro_batch_size: int, precision: str) -> Budget:
    """The budget of one size; arguments as in `growth_budget`."""
    memory = training_memory(model, micro_batch_size, precision)
    rung = _rung("model", model, precision, memory)
    return Budget(precision=precision, micro_batch_size=micro_batch_size, rungs=(rung,))


def _rung(
    name: str,
    model: LanguageModelConfig,
    precision: str,
    memory: Memory,
    growth: GrowthPlan | None = None,
    stage: StageBudget | None = None,
) -> RungBudget:
    return RungBudget(
        name=name,
        appended=tuple(map(Appended.of, growth.steps)) if growth else (),
        parameters=model.num_parameters(),
        flops_per_token=model.flops_per_token(),
        scratch_flops=_scratch_flops(model),
        checkpoint_bytes=checkpoint_bytes(model, precision),
        memory=memory,
        stage=stage,
    )


def _stage(
    run: TrainConfig, stage: StageConfig, flops_before: int, speed: float | None
) -> StageBudget:
    tokens = stage.steps * run.batch_size * stage.model.context_length
    flops = tokens * stage.model.flops_per_token()
    return StageBudget(
        steps=stage.steps,
        may_end_before=stage.plateau is not None,
        tokens=tokens,
        flops=flops,
        cumulative_flops=flops_before + flops,
        of_scratch=(flops_before + flops) / _scratch_flops(stage.model),
        flops_per_second=speed,
        hours=None if speed is None else flops / speed / SECONDS_PER_HOUR,
    )


def _scratch_flops(model: LanguageModelConfig) -> int:
    return SCRATCH_TOKENS * model.flops_per_token()
