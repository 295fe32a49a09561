"""Inside a stage: updates over global batches, validation, logs and checkpoints.

Shapes: `B` batch, `T` sequence.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric import Fabric
from rich.console import Console
from torch import Tensor

from tokengrow.checkpoint.store import Checkpoint
from tokengrow.console.stage_progress import StageProgress, stage_progress
from tokengrow.data.corpus import Split
from tokengrow.data.loader import train_loader, validation_loader
from tokengrow.data.sequences import Sequences, TokenSource
from tokengrow.data.tokenizer import Tokenizer
from tokengrow.distributed.collectives import broadcast_from_rank0, copy_to_host, full_tensor
from tokengrow.distributed.parallelize import compile_blocks, is_compiled
from tokengrow.errors import Stopped
from tokengrow.metrics.run_log import RunLog
from tokengrow.metrics.throughput import Throughput
from tokengrow.model.config import ModelConfig, Taus
from tokengrow.model.tokenformer import LanguageModel, TokenFormer
from tokengrow.optim.adamw import AgedAdamW
from tokengrow.optim.config import optimizer_state
from tokengrow.optim.schedule import learning_rate
from tokengrow.training.checkpoint_writer import CheckpointWriter
from tokengrow.training.config import StageConfig, TrainConfig
from tokengrow.training.nonfinite import (
    GradientWatch,
    check_validation,
    count_skipped,
    poison_nonfinite_grad,
)
from tokengrow.training.plateau import plateaued
from tokengrow.training.preemption import StopRequest
from tokengrow.training.resume import resume_hint
from tokengrow.training.state import TrainState
from tokengrow.training.wall_time import WallTime


@dataclass(frozen=True)
class Run:
    """What stays the same from the first stage to the last."""

    config: TrainConfig
    fabric: Fabric
    tokens: TokenSource
    tokenizer: Tokenizer
    console: Console
    saver: CheckpointWriter
    stop: StopRequest
    log: RunLog
    clock: WallTime

    @property
    def out(self) -> Path:
        """Folder of the run."""
        return Path(self.config.out)

    def sequences(self, stage: StageConfig, split: Split) -> Sequences:
        """A split, cut to the stage's context length."""
        return self.tokens.sequences(split, stage.model.context_length)


@dataclass(frozen=True)
class Training:
    """The stage at hand, set up by Fabric."""

    stage: StageConfig
    module: Any
    """The TokenFormerModule, in Fabric's wrapper."""
    model: LanguageModel
    """The bare model inside it."""
    optimizer: Any
    """What takes a step, in Fabric's wrapper too: `adamw`, or on every rank a part of it."""
    adamw: AgedAdamW
    """Over this rank's parameters."""
    lineage: list[Any]
    """Of the model."""
    watch: GradientWatch
    """Which updates are not taken, since their gradient is not finite."""


def train_stage(run: Run, training: Training, state: TrainState) -> None:
    """Trains until the stage ends, with a validation; validates, logs and saves on the way."""
    config, stage = run.config, training.stage
    batches = _batches(run, stage, state.next_batch)
    tokens = config.batch_size * stage.model.context_length
    flops_per_token = stage.model.flops_per_token()
    speed = Throughput(run.fabric, config.fabric.chosen_precision, flops_per_token)
    with stage_progress(run.console, stage.name, state.stage_step, stage.steps) as progress:
        ended = False
        while not ended:
            _stop_if_asked(run, training, state)
            _compile_once_settled(run, training, state)
            loss, norm, rate = _update(run, training, batches, state.stage_step + 1)
            state.advance(tokens, flops_per_token)
            _anneal_tau(run, training, state)
            speed.add(tokens)
            done = state.stage_step
            ended = done == stage.steps
            if _should_sync(run, done) or ended:
                _count_skipped(run, training, state)
            if done % config.log_every == 0 or ended:
                _log(run, state, progress, speed, loss=loss, grad_norm=norm, lr=rate)
            if done % config.validation_every == 0 or ended:
                progress.validated(done, validate(run, training, state))
                speed.restart()
                ended = ended or _at_a_plateau(run, stage, state)
            if done % config.checkpoint_every == 0 and not ended:
                save_stage(run, training, state, needed=False)
                speed.restart()


def _stop_if_asked(run: Run, training: Training, state: TrainState) -> None:
    """Between two updates: saves what was trained since the last checkpoint, and stops."""
    if not run.stop.requested():
        return
    if state.step and not broadcast_from_rank0(lambda: run.saver.has(state.step)):
        _count_skipped(run, training, state)
        save_stage(run, training, state)
    broadcast_from_rank0(run.saver.finish)
    raise Stopped(
        f"stopped as asked in stage {training.stage.name}, step {state.stage_step}/"
        f"{training.stage.steps}; {resume_hint(run.out)}"
    )


def _should_sync(run: Run, done: int) -> bool:
    """Whether this update's results are read, which waits for the device.

    A GPU is given the next update while it works on this one; a CPU is never ahead.
    """
    config = run.config
    intervals = config.log_every, config.validation_every, config.checkpoint_every
    return run.fabric.device.type == "cpu" or any(done % every == 0 for every in intervals)


def _count_skipped(run: Run, training: Training, state: TrainState) -> None:
    """Counts the updates that were not taken, and says so; too many in a row stop the run."""
    # Opened only where its numbers are told: Megatron's order takes a lock that other runs share.
    sequences = partial(run.sequences, training.stage, "train")
    out = run.out if run.fabric.is_global_zero else None
    if line := count_skipped(training.watch, state, run.config, sequences, out):
        run.console.print(line, highlight=False, soft_wrap=True)


def _compile_once_settled(run: Run, training: Training, state: TrainState) -> None:
    """Compiles the blocks, but not before tau has arrived: it is a constant of compiled code."""
    blocks = training.model.blocks
    if run.config.compiles and not is_compiled(blocks[0]):
        moving = state.rung.tau_start is not None
        if not moving or state.stage_step >= _anneal_steps(run, training.stage):
            run.console.print("compiling the blocks: the first update takes a while")
            compile_blocks(blocks)


def _at_a_plateau(run: Run, stage: StageConfig, state: TrainState) -> bool:
    """Whether the stage's plateau rule ends it here, which is said."""
    rule = stage.plateau
    if rule is None or not plateaued(state.losses(_settled(run, stage, state)), rule):
        return False
    run.console.print(
        f"stage {stage.name} ends at a plateau (patience {rule.patience}, min_delta "
        f"{rule.min_delta:g}) after {state.stage_step} of at most {stage.steps} steps",
        highlight=False,
        soft_wrap=True,
    )
    return True


def _batches(run: Run, stage: StageConfig, start_batch: int) -> Iterator[Tensor]:
    """Micro-batches [b, T + 1] of this rank on its device, from a global batch on, endlessly."""
    loader = train_loader(
        run.sequences(stage, "train"),
        seed=run.config.seed,
        batch_size=run.config.batch_size,
        micro_batch_size=run.config.micro_batch_size,
        start_batch=start_batch,
        rank=run.fabric.global_rank,
        world_size=run.fabric.world_size,
    )
    return iter(cast(Any, run.fabric.setup_dataloaders(loader, use_distributed_sampler=False)))


def _update(
    run: Run, training: Training, batches: Iterator[Tensor], update: int
) -> tuple[Tensor, Tensor, float]:
    """One optimizer update over a global batch.

    Returns:
        Its mean loss (scalar tensor), the norm of its gradient before clipping (likewise), its
        rate.
    """
    config, stage, fabric = run.config, training.stage, run.fabric
    rate = learning_rate(stage.optim, update, stage.steps)
    for group in training.optimizer.param_groups:
        group["lr"] = rate
    parts = config.batch_size // (config.micro_batch_size * fabric.world_size)
    losses = []
    for part in range(parts):
        batch = next(batches)
        with fabric.no_backward_sync(training.module, enabled=part < parts - 1):
            # On one device Fabric calls training_step past its own autocast: enter it here.
            with fabric.autocast():
                loss = training.module.training_step(batch, part) / parts
            fabric.backward(poison_nonfinite_grad(loss))
        losses.append(loss.detach())
    training.adamw.drop_frozen_gradients()
    norm = fabric.clip_gradients(
        training.module,
        training.optimizer,
        max_norm=stage.optim.grad_clip,
        error_if_nonfinite=False,
    )
    assert norm is not None
    norm = full_tensor(norm)
    training.adamw.skip_if(training.watch.see(update, norm, torch.stack(losses)))
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)
    return cast(Tensor, sum(losses)), norm, rate


def _anneal_tau(run: Run, training: Training, state: TrainState) -> None:
    """Moves tau on its way from that of the source to that of the stage, where it is annealed."""
    if state.rung.tau_start is not None:
        start, stage = Taus(**state.rung.tau_start), training.stage
        share = state.stage_step / _anneal_steps(run, stage)
        model, end = cast(TokenFormer, training.model), cast(ModelConfig, stage.model)
        model.set_tau(start.towards(end.tau, share))


def _anneal_steps(run: Run, stage: StageConfig) -> int:
    """Updates in which tau is annealed; a short stage is long enough for all of its way."""
    return min(run.config.growth.anneal_steps, stage.steps)


def _settled(run: Run, stage: StageConfig, state: TrainState) -> float:
    """The update of the stage from which its rate and its tau are what they stay."""
    annealed = _anneal_steps(run, stage) if state.rung.tau_start is not None else 1
    return max(annealed, stage.optim.warmup, 1)


@torch.no_grad()
def mean_loss(run: Run, stage: StageConfig, module: Any) -> float:
    """Mean validation loss in nats per token, over `validation_sequences`."""
    config, fabric = run.config, run.fabric
    loader = validation_loader(
        run.sequences(stage, "validation"),
        batch_size=config.micro_batch_size,
        max_sequences=config.validation_sequences,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
    )
    total = torch.zeros(2, dtype=torch.float64, device=fabric.device)  # summed loss, sequences
    for index, batch in enumerate(fabric.setup_dataloaders(loader, use_distributed_sampler=False)):
        with fabric.autocast():
            loss = module.validation_step(batch, index)
        total += total.new_tensor([loss.item() * len(batch), len(batch)])
    summed, count = cast(Tensor, fabric.all_reduce(total, reduce_op="sum")).tolist()
    return summed / count


def validate(run: Run, training: Training, state: TrainState) -> float:
    """The mean validation loss, noted in the state and logged; one that is not finite stops."""
    mean = mean_loss(run, training.stage, training.module)
    check_validation(mean, training.stage, state)
    state.record_validation(mean)
    run.clock.note_validation()
    run.log.write({"validation/loss": mean}, state)
    return mean


def _log(
    run: Run,
    state: TrainState,
    progress: StageProgress,
    speed: Throughput,
    loss: Tensor,
    grad_norm: Tensor,
    lr: float,
) -> None:
    metrics = {
        "train/loss": cast(Tensor, run.fabric.all_reduce(loss)).item(),
        "train/grad_norm": grad_norm.item(),
        "train/lr": lr,
        "skipped_steps": state.rung.skipped,
        **speed.read(),
    }
    progress.update(state.stage_step, metrics)
    run.log.write(metrics, state)


def save_stage(run: Run, training: Training, state: TrainState, needed: bool = True) -> None:
    """Begins to write a checkpoint: rank 0 has a copy of everything when this returns.

    Args:
        run: around it.
        training: the stage.
        state: where the run stands.
        needed: stop the run where the disk has no room for it; else warn, and go on.
    """
    broadcast_from_rank0(run.saver.finish)  # before its memory is needed for the next one
    checkpoint = Checkpoint(
        config=training.model.config,
        weights=copy_to_host(training.model.state_dict().items()),
        optimizer=optimizer_state(training.model, training.adamw),
        train_state=state.to_dict(),
        run=run.config.to_dict(),
        lineage=training.lineage,
        times=run.clock.to_dict(),
        tokenizer=run.tokenizer.to_json(),
        end_of_text=run.tokenizer.end_of_text_token,
    )
    if run.fabric.is_global_zero:
        run.saver.save(checkpoint, set(state.stage_ends), needed)
