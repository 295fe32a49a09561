"""The loop: a ladder's stages, one after the other, resumable anywhere.

A stage boundary is always the same four steps: write a complete checkpoint, grow it on the CPU,
verify it, load it into the new model. A stage therefore always starts from something on the disk
(or from initial weights), and a run that was killed takes the same way as one that was not.

Shapes: `B` batch, `T` sequence.
"""

import gc
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tokengrow.checkpoint.store import (
    Checkpoint,
    load_checkpoint,
    set_damaged_aside,
)
from tokengrow.data.loader import probe_batch
from tokengrow.data.sequences import TokenSource
from tokengrow.distributed.fabric import build_fabric, release
from tokengrow.errors import UserError
from tokengrow.evaluation.report import plot_loss_against_flops
from tokengrow.files import locked, write_yaml
from tokengrow.growth.plan import plan_growth
from tokengrow.model.tokenformer import TokenFormer
from tokengrow.training.boundary import grow_checkpoint
from tokengrow.training.finite import GradientWatch
from tokengrow.training.ladder import StageConfig, TrainConfig
from tokengrow.training.metrics import LoggerConfig, RunLog
from tokengrow.training.module import TokenFormerModule
from tokengrow.training.optim import load_optimizer_state
from tokengrow.training.resume import CONFIG_FILE, find_start, where_it_stands
from tokengrow.training.speed import device_name, fits
from tokengrow.training.stage import Run, Training, mean_loss, save_stage, train_stage, validate
from tokengrow.training.state import Rung, TrainState

PLOT_FILE = "loss-vs-flops.png"
NO_LOGGERS = LoggerConfig(kinds=[])
"""Of every process but the first."""


@dataclass(frozen=True)
class FitResult:
    """What a run ended with."""

    state: TrainState
    """Counters, rungs and validation losses."""
    checkpoint: Checkpoint
    """The last one, as it lies on the disk."""
    plot: Path
    """PNG of validation loss against training FLOPs."""


def fit(config: TrainConfig, tokens: TokenSource, console: Console | None = None) -> FitResult:
    """Trains a ladder, or goes on with it where `config.out` stands.

    Args:
        config: the run.
        tokens: what it trains on.
        console: where progress is shown; by default nowhere.

    Raises:
        UserError: data, a source or an `out` that do not fit the config; nothing is written then.
    """
    _check_fits(config, tokens)
    config.check_kernel()
    fabric = build_fabric(config.fabric)
    log = RunLog(config.logger if fabric.is_global_zero else NO_LOGGERS, Path(config.out))
    state, checkpoint = find_start(config, tokens)
    fabric.barrier()  # every rank has read `out` before one writes there
    run = Run(config, fabric, tokens, tokens.tokenizer(), console or Console(quiet=True), log)
    with ExitStack() as held:
        if fabric.is_global_zero:
            _take(run.out, held)
            set_damaged_aside(run.out, checkpoint if state.rungs else None)
            write_yaml(run.out / CONFIG_FILE, config.to_dict())
        held.enter_context(log)
        return _climb(run, state, checkpoint)


def _climb(run: Run, state: TrainState, checkpoint: Checkpoint | None) -> FitResult:
    """Trains the stages that are not done yet."""
    if state.rungs:
        run.console.print(where_it_stands(run.config, state), highlight=False)
    ahead = range(len(state.stage_ends), len(run.config.stages))
    if ahead:
        run.log.open(run.config.to_dict())
    for index in ahead:
        checkpoint = _stage(run, index, state, checkpoint)
    assert checkpoint is not None, "a finished run has a checkpoint"
    plot = run.out / PLOT_FILE
    if run.fabric.is_global_zero:
        rungs = [asdict(rung) for rung in state.rungs]
        plot_loss_against_flops(rungs, state.validation, plot)
    return FitResult(state, checkpoint, plot)


def _stage(run: Run, index: int, state: TrainState, checkpoint: Checkpoint | None) -> Checkpoint:
    """Trains one stage; its model is gone before the next one is made."""
    with fits(run.config, run.config.stages[index], device_name(run.fabric.device)):
        training = _enter_stage(run, index, state, checkpoint)
        train_stage(run, training, state)
    release(run.fabric, training.module)
    return _leave_stage(run, training, state)


def _check_fits(config: TrainConfig, tokens: TokenSource) -> None:
    """Refuses tokens that do not fit the models."""
    config.check_vocabulary(tokens.vocab_size)
    for stage in config.stages:
        for split in ("train", "validation"):
            tokens.sequences(split, stage.model.context_length)


def _take(out: Path, held: ExitStack) -> None:
    """Makes the run's folder and holds it against a second run."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(out, wait=False))
    except BlockingIOError:
        raise UserError(
            f"out={out} is being trained by another process: wait for it, or choose another out="
        ) from None
    except OSError as error:
        raise UserError(
            f"out={out} cannot be written ({error.strerror}): choose another out="
        ) from None


def _enter_stage(
    run: Run, index: int, state: TrainState, checkpoint: Checkpoint | None
) -> Training:
    """Sets a stage up from where the run stands; a stage entered anew is counted and validated."""
    stage = run.config.stages[index]
    if len(state.rungs) > index:  # left in the middle of this stage
        assert checkpoint is not None
        return _set_up(run, stage, checkpoint, state.stage_step)
    rung = Rung(stage.name, stage.model.num_parameters())
    if checkpoint is None:
        model = TokenFormer(stage.model)
        model.init_weights(torch.Generator().manual_seed(run.config.seed))
        start = Checkpoint.of(model)
    else:
        rung.loss_before = (
            state.rungs[-1].loss_end if state.rungs else _source_loss(run, stage, checkpoint)
        )
        start = _grow(run, stage, checkpoint, rung, state.step)
        if run.config.growth.tau == "anneal" and start.config.tau != stage.model.tau:
            rung.tau_start = asdict(start.config.tau)
    training = _set_up(run, stage, start, done=0)
    state.enter(index, rung)
    rung.loss_start = validate(run, training, state)
    return training


def _source_loss(run: Run, stage: StageConfig, source: Checkpoint) -> float:
    """Validation loss of the checkpoint that the run starts from, before it is grown."""
    module = _to_device(run, stage, source)
    loss = mean_loss(run, stage, module)
    release(run.fabric, module)
    return loss


def _grow(
    run: Run, stage: StageConfig, checkpoint: Checkpoint, rung: Rung, step: int
) -> Checkpoint:
    """Grows a checkpoint to the stage's size, verified on real validation tokens."""
    growth = replace(run.config.growth, seed=run.config.growth.seed + run.config.seed)
    plan = plan_growth(checkpoint.config, stage.model, config=growth)
    if not plan.steps:
        return checkpoint
    probe = probe_batch(run.sequences(stage, "validation"))
    grown = grow_checkpoint(checkpoint, plan, probe)
    rung.drift = grown.lineage[-1]["drift"]["max_logit"]
    text = (
        f"grown {plan.source.num_parameters():,} -> {rung.parameters:,} parameters: "
        f"logits moved by at most {rung.drift:.1e}"
    )
    run.console.print(text, highlight=False)
    run.log.mark_growth(stage.name, rung.parameters, rung.drift, text, step)
    return grown


def _to_device(run: Run, stage: StageConfig, start: Checkpoint) -> Any:
    """The checkpoint's model in a TokenFormerModule, in Fabric's wrapper."""
    # Weights are float32 whatever they were saved in; Fabric's precision takes it from there.
    model = TokenFormer.from_weights(start.config, start.weights, torch.float32).train()
    model.set_kernel(run.config.kernel)
    return run.fabric.setup_module(TokenFormerModule(model, stage.optim, stage.steps))


def _set_up(run: Run, stage: StageConfig, start: Checkpoint, done: int) -> Training:
    """Puts a model on the device and gives it its optimizer, in the order that FSDP needs too.

    Args:
        run: around it.
        stage: that it is in.
        start: weights and optimizer state.
        done: updates of the stage that they have had.
    """
    gc.collect()  # Fabric's wrappers refer to each other, and this model needs the room
    module = _to_device(run, stage, start)
    model: TokenFormer = module.model
    optimizer = module.configure_optimizers()["optimizer"]
    load_optimizer_state(model, optimizer, start.optimizer)
    optimizer.begin_stage(run.config.growth, done)
    return Training(
        stage,
        module,
        model,
        run.fabric.setup_optimizers(optimizer),
        list(start.lineage),
        GradientWatch(run.fabric.device),
    )


def _leave_stage(run: Run, training: Training, state: TrainState) -> Checkpoint:
    """Writes the stage's last checkpoint and reads back what the next one grows from."""
    state.leave(state.validation[-1]["loss"])
    return load_checkpoint(save_stage(run, training, state))
