"""The loop: a ladder's stages, one after the other, resumable anywhere.

A stage boundary is always the same four steps: write a complete checkpoint, grow it on the CPU,
verify it, load it into the new model. A stage therefore always starts from something on the disk
(or from initial weights), and a run that was killed takes the same way as one that was not.

Shapes: `B` batch, `T` sequence.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric import Fabric
from rich.console import Console
from torch import Tensor

from tokengrow.checkpoint.layout import step_folder
from tokengrow.checkpoint.store import (
    Checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    set_damaged_aside,
)
from tokengrow.data.corpus import Split
from tokengrow.data.loader import probe_batch, train_loader, validation_loader
from tokengrow.data.sequences import Sequences, TokenSource
from tokengrow.data.tokenizer import Tokenizer
from tokengrow.distributed.fabric import build_fabric
from tokengrow.errors import UserError
from tokengrow.evaluation.report import plot_loss_against_flops
from tokengrow.files import locked, write_yaml
from tokengrow.growth.plan import plan_growth
from tokengrow.model.config import Taus
from tokengrow.model.tokenformer import TokenFormer
from tokengrow.training.boundary import grow_checkpoint
from tokengrow.training.ladder import StageConfig, TrainConfig
from tokengrow.training.metrics import Throughput, build_loggers
from tokengrow.training.module import TokenFormerModule
from tokengrow.training.optim import load_optimizer_state, optimizer_state
from tokengrow.training.plateau import plateaued
from tokengrow.training.progress import StageProgress, stage_progress
from tokengrow.training.resume import CONFIG_FILE, find_start, where_it_stands
from tokengrow.training.schedule import learning_rate
from tokengrow.training.state import Rung, TrainState

PLOT_FILE = "loss-vs-flops.png"


@dataclass(frozen=True)
class FitResult:
    """What a run ended with."""

    state: TrainState
    """Counters, rungs and validation losses."""
    checkpoint: Checkpoint
    """The last one, as it lies on the disk."""
    plot: Path
    """PNG of validation loss against training FLOPs."""


@dataclass(frozen=True)
class Run:
    """What stays the same from the first stage to the last."""

    config: TrainConfig
    fabric: Fabric
    tokens: TokenSource
    tokenizer: Tokenizer
    console: Console

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
    model: TokenFormer
    """The bare model inside it."""
    optimizer: Any
    """AdamW, in Fabric's wrapper too."""
    lineage: list[Any]
    """Of the model."""


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
    fabric = build_fabric(config.fabric, build_loggers(config.logger, Path(config.out)))
    state, checkpoint = find_start(config, tokens)
    fabric.barrier()  # every rank has read `out` before one writes there
    run = Run(config, fabric, tokens, tokens.tokenizer(), console or Console(quiet=True))
    with ExitStack() as held:
        if fabric.is_global_zero:
            _take(run.out, held)
            set_damaged_aside(run.out, checkpoint if state.rungs else None)
            write_yaml(run.out / CONFIG_FILE, config.to_dict())
        return _climb(run, state, checkpoint)


def _climb(run: Run, state: TrainState, checkpoint: Checkpoint | None) -> FitResult:
    """Trains the stages that are not done yet."""
    if state.rungs:
        run.console.print(where_it_stands(run.config, state), highlight=False)
    for index in range(len(state.stage_ends), len(run.config.stages)):
        training = _enter_stage(run, index, state, checkpoint)
        _train_stage(run, training, state)
        checkpoint = _leave_stage(run, training, state)
    assert checkpoint is not None, "a finished run has a checkpoint"
    plot = run.out / PLOT_FILE
    if run.fabric.is_global_zero:
        rungs = [asdict(rung) for rung in state.rungs]
        plot_loss_against_flops(rungs, state.validation, plot)
    return FitResult(state, checkpoint, plot)


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
        start = _grow(run, stage, checkpoint, rung)
        if run.config.growth.tau == "anneal" and start.config.tau != stage.model.tau:
            rung.tau_start = asdict(start.config.tau)
    training = _set_up(run, stage, start, done=0)
    state.enter(index, rung)
    rung.loss_start = _validate(run, training, state)
    return training


def _source_loss(run: Run, stage: StageConfig, source: Checkpoint) -> float:
    """Validation loss of the checkpoint that the run starts from, before it is grown."""
    return _mean_loss(run, stage, _to_device(run, stage, source))


def _grow(run: Run, stage: StageConfig, checkpoint: Checkpoint, rung: Rung) -> Checkpoint:
    """Grows a checkpoint to the stage's size, verified on real validation tokens."""
    growth = replace(run.config.growth, seed=run.config.growth.seed + run.config.seed)
    plan = plan_growth(checkpoint.config, stage.model, config=growth)
    if not plan.steps:
        return checkpoint
    probe = probe_batch(run.sequences(stage, "validation"))
    grown = grow_checkpoint(checkpoint, plan, probe)
    rung.drift = grown.lineage[-1]["drift"]["max_logit"]
    run.console.print(
        f"grown {plan.source.num_parameters():,} -> {plan.target.num_parameters():,} parameters: "
        f"logits moved by at most {rung.drift:.1e}",
        highlight=False,
    )
    return grown


def _to_device(run: Run, stage: StageConfig, start: Checkpoint) -> Any:
    """The checkpoint's model in a TokenFormerModule, in Fabric's wrapper."""
    # Weights are float32 whatever they were saved in; Fabric's precision takes it from there.
    model = TokenFormer.from_weights(start.config, start.weights, torch.float32).train()
    return run.fabric.setup_module(TokenFormerModule(model, stage.optim, stage.steps))


def _set_up(run: Run, stage: StageConfig, start: Checkpoint, done: int) -> Training:
    """Puts a model on the device and gives it its optimizer, in the order that FSDP needs too.

    Args:
        run: around it.
        stage: that it is in.
        start: weights and optimizer state.
        done: updates of the stage that they have had.
    """
    module = _to_device(run, stage, start)
    model: TokenFormer = module.model
    optimizer = module.configure_optimizers()["optimizer"]
    load_optimizer_state(model, optimizer, start.optimizer)
    optimizer.begin_stage(run.config.growth, done)
    return Training(
        stage, module, model, run.fabric.setup_optimizers(optimizer), list(start.lineage)
    )


def _train_stage(run: Run, training: Training, state: TrainState) -> None:
    """Trains until the stage ends, with a validation; validates, logs and saves on the way."""
    config, stage = run.config, training.stage
    batches = _batches(run, stage, state.next_batch)
    tokens = config.batch_size * stage.model.context_length
    flops_per_token = stage.model.flops_per_token()
    speed = Throughput()
    with stage_progress(run.console, stage.name, state.stage_step, stage.steps) as progress:
        ended = False
        while not ended:
            loss, norm, rate = _update(run, training, batches, state.stage_step + 1)
            state.advance(tokens, flops_per_token)
            _anneal_tau(run, training, state)
            speed.add(tokens)
            done = state.stage_step
            ended = done == stage.steps
            if done % config.log_every == 0 or ended:
                _log(run, state, progress, speed, loss=loss, grad_norm=norm, lr=rate)
            if done % config.validation_every == 0 or ended:
                _validate(run, training, state)
                speed.restart()
                ended = ended or _at_a_plateau(run, stage, state)
            if done % config.checkpoint_every == 0 and not ended:
                _save(run, training, state)
                speed.restart()


def _at_a_plateau(run: Run, stage: StageConfig, state: TrainState) -> bool:
    """Whether the stage's plateau rule ends it here, which is said."""
    rule = stage.plateau
    if rule is None or not plateaued(state.losses, rule):
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
    total = torch.zeros((), device=fabric.device)
    for part in range(parts):
        batch = next(batches)
        with fabric.no_backward_sync(training.module, enabled=part < parts - 1):
            # On one device Fabric calls training_step past its own autocast: enter it here.
            with fabric.autocast():
                loss = training.module.training_step(batch, part) / parts
            fabric.backward(loss)
        total += loss.detach()
    training.optimizer.drop_frozen_gradients()
    norm = fabric.clip_gradients(
        training.module,
        training.optimizer,
        max_norm=stage.optim.grad_clip,
        error_if_nonfinite=False,
    )
    assert norm is not None
    if not norm.isfinite():
        raise UserError(
            f"stage {stage.name}, step {update}: the gradient is not finite (loss {total:.4g}, "
            f"learning rate {rate:.3g}): lower stages.{stage.name}.optim.lr or raise its "
            "warmup_steps; this step was not taken, and checkpoints before it are whole"
        )
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)
    return total, norm, rate


def _anneal_tau(run: Run, training: Training, state: TrainState) -> None:
    """Moves tau on its way from that of the source to that of the stage, where it is annealed."""
    if state.rung.tau_start is not None:
        steps = min(run.config.growth.anneal_steps, training.stage.steps)
        start = Taus(**state.rung.tau_start)
        training.model.set_tau(start.towards(training.stage.model.tau, state.stage_step / steps))


@torch.no_grad()
def _mean_loss(run: Run, stage: StageConfig, module: Any) -> float:
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


def _validate(run: Run, training: Training, state: TrainState) -> float:
    """The mean validation loss, noted in the state and logged."""
    mean = _mean_loss(run, training.stage, training.module)
    state.record_validation(mean)
    run.fabric.log_dict(
        {"validation/loss": mean, "tokens": state.tokens, "flops": state.flops}, state.step
    )
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
    mean, per_second = cast(Tensor, run.fabric.all_reduce(loss)).item(), speed.read()
    progress.update(state.stage_step, mean, per_second)
    metrics = {
        "train/loss": mean,
        "train/grad_norm": grad_norm.item(),
        "train/lr": lr,
        "tokens_per_second": per_second,
        "tokens": state.tokens,
        "flops": state.flops,
        "stage": state.stage,
    }
    run.fabric.log_dict(metrics, state.step)


def _leave_stage(run: Run, training: Training, state: TrainState) -> Checkpoint:
    """Writes the stage's last checkpoint and reads back what the next one grows from."""
    state.leave(state.validation[-1]["loss"])
    return load_checkpoint(_save(run, training, state))


def _save(run: Run, training: Training, state: TrainState) -> Path:
    """Writes a checkpoint and prunes older ones, but never the last of a stage."""
    folder = run.out / step_folder(state.step)
    checkpoint = replace(
        Checkpoint.of(training.model),
        optimizer=optimizer_state(training.model, training.optimizer),
        train_state=state.to_dict(),
        run=run.config.to_dict(),
        lineage=training.lineage,
        tokenizer=run.tokenizer.to_json(),
        end_of_text=run.tokenizer.end_of_text_token,
    )
    if run.fabric.is_global_zero:
        save_checkpoint(folder, checkpoint)
        prune_checkpoints(run.out, run.config.keep_checkpoints, set(state.stage_ends))
    run.fabric.barrier()
    return folder
