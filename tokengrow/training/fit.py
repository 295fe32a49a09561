"""The loop: a ladder's stages, one after the other, resumable anywhere.

A stage boundary is always the same four steps: write a complete checkpoint, grow it on the CPU,
verify it, load it into the new model. A stage therefore always starts from something on the disk
(or from initial weights), and a run that was killed takes the same way as one that was not.

Shapes: `B` batch, `T` sequence.
"""

import gc
import shutil
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from rich.console import Console

from tokengrow.checkpoint.layout import step_folder
from tokengrow.checkpoint.store import (
    Checkpoint,
    is_stale_partial,
    load_checkpoint,
    quarantine_damaged,
)
from tokengrow.data.loader import probe_batch
from tokengrow.data.sequences import TokenSource
from tokengrow.distributed.collectives import (
    all_gather_object,
    barrier,
    broadcast_from_rank0,
    scatter_from_rank0,
    to_local,
)
from tokengrow.distributed.fabric import build_fabric, device_name, release, started_by
from tokengrow.distributed.launch import GUIDE
from tokengrow.distributed.parallelize import checkpoint_blocks, own_part, share_optimizer
from tokengrow.distributed.peer_failure import monitor_peers
from tokengrow.errors import Stopped, UserError
from tokengrow.files import as_yaml, directory_lock, is_stale_temporary, write_atomically
from tokengrow.growth.checkpoint import grow_checkpoint
from tokengrow.growth.plan import moving_tau, plan_growth
from tokengrow.metrics.run_log import LoggerConfig, RunLog
from tokengrow.model.architectures import build_model
from tokengrow.model.tokenformer import LanguageModel, fastest_attention
from tokengrow.optim.config import load_optimizer_state
from tokengrow.training.checkpoint_writer import CheckpointWriter
from tokengrow.training.config import StageConfig, TrainConfig
from tokengrow.training.device_memory import fits
from tokengrow.training.module import TokenFormerModule
from tokengrow.training.nonfinite import GradientWatch
from tokengrow.training.preemption import StopRequest
from tokengrow.training.resume import (
    CONFIG_FILE,
    RECORDS,
    find_start,
    resume_hint,
    status_line,
)
from tokengrow.training.stage import Run, Training, mean_loss, save_stage, train_stage, validate
from tokengrow.training.state import Rung, TrainState
from tokengrow.training.wall_time import WallTime, new_session, record_session

NO_LOGGERS = LoggerConfig(kinds=[])
"""Of every process but the first."""


@dataclass(frozen=True)
class FitResult:
    """What a run ended with."""

    state: TrainState
    """Counters, rungs and validation losses."""
    checkpoint: Checkpoint
    """The last one, as it lies on the disk."""


def fit(config: TrainConfig, tokens: TokenSource, console: Console | None = None) -> FitResult:
    """Trains a ladder, or goes on with it where `config.out` stands.

    Args:
        config: the run.
        tokens: what it trains on.
        console: where progress is shown; by default nowhere.

    Raises:
        UserError: data, a source or an `out` that do not fit the config; nothing is written then.
        Stopped: SIGTERM came; what was trained is saved.
        PeerLostError: another process of the run is gone.
    """
    _check_fits(config, tokens)
    config.check_kernel()
    config.logger.check_installed()
    fabric = build_fabric(config.fabric)
    with monitor_peers(started_by(fabric)):
        try:
            return _fit(config, tokens, fabric, console or Console(quiet=True))
        except Stopped as stopped:
            # Rank 0 may still be closing its logs, and launchers end a job at the first process
            # that leaves with a status.
            barrier()
            # Its traceback would hold the model, and that the line to the others, to the end.
            raise stopped.with_traceback(None) from None


def _fit(config: TrainConfig, tokens: TokenSource, fabric: Fabric, console: Console) -> FitResult:
    """`fit`, by processes that all have come this far."""
    config.check_share(fabric.world_size)
    _check_one_data(tokens)
    # One folder for all ranks, each of which may have read another time off its clock.
    config = replace(config, out=broadcast_from_rank0(lambda: config.out))
    out, stop = Path(config.out), StopRequest()
    state, checkpoint = broadcast_from_rank0(lambda: find_start(config, tokens), _described)
    saver = CheckpointWriter(out, config.keep_checkpoints, console)
    log = RunLog(config.logger if fabric.is_global_zero else NO_LOGGERS, out)
    clock = _clock(state, checkpoint)
    run = Run(config, fabric, tokens, tokens.tokenizer(), console, saver, stop, log, clock)
    try:
        with ExitStack() as held:
            broadcast_from_rank0(lambda: _take(run, held, checkpoint if state.rungs else None))
            broadcast_from_rank0(lambda: _record_session(run, held, state))
            for each in (log, saver, stop):
                held.enter_context(each)
            return _climb(run, state, checkpoint)
    except KeyboardInterrupt:  # told once a save that has begun has ended
        raise KeyboardInterrupt(resume_hint(out)) from None


def _check_one_data(tokens: TokenSource) -> None:
    """Refuses ranks that do not all have the same tokens."""
    fingerprints = all_gather_object(tokens.fingerprint)
    for rank, fingerprint in enumerate(fingerprints):
        if fingerprint != fingerprints[0]:
            raise UserError(
                f"rank {rank} has other tokens than rank 0: make them once, with `tokengrow data`, "
                f"and give the folder as store= where every node sees it ({GUIDE})"
            )


def _described(found: tuple[TrainState, Checkpoint | None]) -> tuple[TrainState, Checkpoint | None]:
    """What ranks need that read no checkpoint: all but its tensors."""
    state, checkpoint = found
    return state, checkpoint and checkpoint.described()


def _record_session(run: Run, held: ExitStack, state: TrainState) -> None:
    """Keeps what this session is, if it has something to train, until `held` is left."""
    if len(state.stage_ends) < len(run.config.stages):
        session = new_session(run.config, run.fabric, state.step)
        held.enter_context(record_session(run.out, session))


def _clock(state: TrainState, checkpoint: Checkpoint | None) -> WallTime:
    """The run's wall time, from where it stands."""
    if checkpoint is None:
        return WallTime()
    if state.rungs:
        return WallTime.resumed(checkpoint.times, len(state.validation))
    return WallTime.starting_from(checkpoint.times)


def _climb(run: Run, state: TrainState, checkpoint: Checkpoint | None) -> FitResult:
    """Trains the stages that are not done yet."""
    if state.rungs:
        run.console.print(status_line(run.config, state), highlight=False, soft_wrap=True)
    ahead = range(len(state.stage_ends), len(run.config.stages))
    if ahead:
        broadcast_from_rank0(lambda: run.log.open(run.config.to_dict()))
    for index in ahead:
        if run.stop.requested():  # everything is saved, and a growth may take long
            name = run.config.stages[index].name
            raise Stopped(f"stopped as asked before stage {name}; {resume_hint(run.out)}")
        checkpoint = _stage(run, index, state, checkpoint)
    assert checkpoint is not None, "a finished run has a checkpoint"
    return FitResult(state, checkpoint)


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


def _take(run: Run, held: ExitStack, newest: Checkpoint | None) -> None:
    """Makes the run's folder, holds it against a second run, and clears up what a kill left.

    Args:
        run: that begins, or goes on.
        held: keeps the folder ours.
        newest: the checkpoint of the run from which it goes on.
    """
    out = run.out
    try:
        out.mkdir(parents=True, exist_ok=True)
        held.enter_context(directory_lock(out, wait=False))
        for path in quarantine_damaged(out, newest):
            run.console.print(f"set aside: {path}", highlight=False, soft_wrap=True)
        write_atomically(out / CONFIG_FILE, as_yaml(run.config.to_dict()))
        for path in list(out.iterdir()):
            if is_stale_partial(path):
                shutil.rmtree(path)
            elif is_stale_temporary(path, RECORDS):
                path.unlink()
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
        return _set_up(run, stage, checkpoint, state, done=state.stage_updates)
    rung = Rung(stage.name, stage.model.num_parameters())
    if checkpoint is not None:
        rung.loss_before = (
            state.rungs[-1].loss_end if state.rungs else _source_loss(run, stage, checkpoint)
        )
    start = broadcast_from_rank0(lambda: _start(run, stage, checkpoint), Checkpoint.described)
    if checkpoint is not None and len(start.lineage) > len(checkpoint.lineage):
        rung.drift = start.lineage[-1]["drift"]["max_logit"]
        _tell_growth(run, checkpoint, rung, state.step)
    if tau := moving_tau(start.config, stage.model, run.config.growth):
        rung.tau_start = asdict(tau)
    training = _set_up(run, stage, start, state, done=0)
    state.enter(index, rung)
    rung.loss_start = validate(run, training, state)
    return training


def _start(run: Run, stage: StageConfig, checkpoint: Checkpoint | None) -> Checkpoint:
    """What a stage starts from: initial weights, or a checkpoint that is grown to its size."""
    if checkpoint is not None:
        return _grow(run, stage, checkpoint)
    model = build_model(stage.model)
    model.init_weights(torch.Generator().manual_seed(run.config.seed))
    return Checkpoint.of(model)


def _source_loss(run: Run, stage: StageConfig, source: Checkpoint) -> float:
    """Validation loss of the checkpoint that the run starts from, before it is grown."""
    module = _to_device(run, stage, source)
    loss = mean_loss(run, stage, module)
    release(run.fabric, module)
    return loss


def _tell_growth(run: Run, source: Checkpoint, rung: Rung, step: int) -> None:
    """Shows a growth, and marks it in the logs."""
    assert rung.drift is not None
    text = (
        f"grown {source.config.num_parameters():,} -> {rung.parameters:,} parameters: "
        f"logits moved by at most {rung.drift:.1e}"
    )
    run.console.print(text, highlight=False)
    run.log.mark_growth(rung.name, rung.parameters, rung.drift, text, step)


def _grow(run: Run, stage: StageConfig, checkpoint: Checkpoint) -> Checkpoint:
    """Grows a checkpoint to the stage's size, verified on real validation tokens."""
    growth = replace(run.config.growth, seed=run.config.growth.seed + run.config.seed)
    plan = plan_growth(checkpoint.config, stage.model, config=growth)
    if not plan.steps:
        return checkpoint
    probe = probe_batch(run.sequences(stage, "validation"))
    return grow_checkpoint(checkpoint, plan, probe)


def _to_device(run: Run, stage: StageConfig, start: Checkpoint) -> Any:
    """The checkpoint's model in a TokenFormerModule, in Fabric's wrapper."""
    # Weights are in the precision of Fabric, whatever they were saved in.
    with run.fabric.init_module(empty_init=True):
        model = build_model(start.config).train()
    model.set_kernel(run.config.kernel)
    recomputed = run.config.fabric.activation_checkpointing
    checkpoint_blocks(model.blocks, recomputed, fastest_attention)
    module = run.fabric.setup_module(TokenFormerModule(model, stage.optim, stage.steps))
    for name, parameter in model.state_dict().items():
        to_local(parameter).copy_(to_local(scatter_from_rank0(parameter, start.weights.get(name))))
    return module


def _set_up(
    run: Run, stage: StageConfig, start: Checkpoint, state: TrainState, done: int
) -> Training:
    """Puts a model on the device and gives it its optimizer, in the order that FSDP2 needs.

    Args:
        run: around it.
        stage: that it is in.
        start: weights and optimizer state, on rank 0.
        state: where the run stands.
        done: updates of the stage that they have had.
    """
    gc.collect()  # Fabric's wrappers refer to each other, and this model needs the room
    module = _to_device(run, stage, start)
    model: LanguageModel = module.model
    optimizer = module.configure_optimizers()["optimizer"]
    if run.config.fabric.zero1 and run.fabric.world_size > 1:
        optimizer = share_optimizer(optimizer)
    adamw = own_part(optimizer)
    load_optimizer_state(model, adamw, start.optimizer)
    adamw.begin_stage(run.config.growth, done)
    return Training(
        stage,
        module,
        model,
        run.fabric.setup_optimizers(optimizer),
        adamw,
        list(start.lineage),
        GradientWatch(run.fabric.device, run.config.max_skipped_steps, state.skipped_in_a_row),
    )


def _leave_stage(run: Run, training: Training, state: TrainState) -> Checkpoint:
    """Writes the stage's last checkpoint and reads back what the next one grows from."""
    state.leave(state.validation[-1]["loss"])
    save_stage(run, training, state)

    def read_back() -> Checkpoint:
        run.saver.finish()
        return load_checkpoint(run.out / step_folder(state.step))

    return broadcast_from_rank0(read_back, Checkpoint.described)
