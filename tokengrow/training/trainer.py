"""Training loop of a ladder: stages with a growth between each two, resumable anywhere.

A stage boundary is always the same four steps: write a complete checkpoint, grow it on the CPU,
verify it, load it into the new model. Every stage therefore starts from a checkpoint on disk, or
from initial weights, and a killed run resumes in the same way.

Shapes: `B` batch, `b` micro-batch, `T` sequence.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from lightning.fabric import Fabric
from rich.console import Console
from torch import Tensor

from tokengrow.checkpoint.layout import step_folder
from tokengrow.checkpoint.schema import RecordedRun, Rung, TrainState
from tokengrow.checkpoint.store import Checkpoint, load_checkpoint
from tokengrow.compat import is_compiled, unregister_module
from tokengrow.console.stage_progress import StageProgress, stage_progress
from tokengrow.data.corpus import Split
from tokengrow.data.open_tokens import check_vocabulary
from tokengrow.data.sequences import Sequences, TokenSource
from tokengrow.distributed.collectives import (
    all_gather_object,
    barrier,
    broadcast_from_rank0,
    copy_to_host,
    full_tensor,
)
from tokengrow.distributed.fabric import (
    build_fabric,
    child_processes,
    device_name,
)
from tokengrow.distributed.launch import CLUSTER_GUIDE
from tokengrow.distributed.parallelize import compile_blocks
from tokengrow.distributed.peer_failure import monitor_peers
from tokengrow.errors import Stopped, UserError
from tokengrow.growth.plan import anneal_start_tau
from tokengrow.metrics.logger_collection import LoggerCollection, LoggerConfig, RunPosition
from tokengrow.metrics.throughput import Throughput
from tokengrow.optim.schedule import learning_rate
from tokengrow.optim.state import collect_optimizer_state
from tokengrow.training.batches import mean_validation_loss, train_batches
from tokengrow.training.checkpoint_writer import CheckpointWriter
from tokengrow.training.config import StageConfig, TrainConfig
from tokengrow.training.device_memory import explain_out_of_memory
from tokengrow.training.nonfinite import (
    check_validation_loss,
    count_skipped_updates,
    poison_nonfinite_grad,
)
from tokengrow.training.plateau import reached_plateau
from tokengrow.training.preemption import StopRequest
from tokengrow.training.resume import find_start, resume_hint, status_line
from tokengrow.training.run_directory import claim_run_directory
from tokengrow.training.stage import Stage, load_module, setup_stage, starting_checkpoint
from tokengrow.training.wall_time import WallTime, new_session, record_session

NO_LOGGERS = LoggerConfig(kinds=[])
"""Logger config of every rank but 0."""


@dataclass(frozen=True)
class FitResult:
    """Result of a run."""

    state: TrainState
    """Counters, rungs and validation losses."""
    checkpoint: Checkpoint
    """Last checkpoint, as loaded from disk."""


def fit(config: TrainConfig, tokens: TokenSource, console: Console | None = None) -> FitResult:
    """Train a ladder, or resume it from the newest checkpoint in `config.out`.

    Args:
        config: the run.
        tokens: tokens to train on.
        console: receives progress; None: no output.

    Returns:
        The final state and the last checkpoint.

    Raises:
        UserError: the data, the source or `out` do not fit the config. Nothing is written then.
        Stopped: SIGTERM was received; everything trained is saved.
        PeerLostError: another process of the run is gone.
    """
    check_vocabulary(tokens.vocab_size, config.min_vocab_size)
    for stage in config.stages:
        for split in ("train", "validation"):
            tokens.sequences(split, stage.model.context_length)
    config.check_kernel()
    config.logger.check_installed()
    fabric = build_fabric(config.fabric)
    with monitor_peers(child_processes(fabric)):
        try:
            return Trainer(config, tokens, fabric, console or Console(quiet=True)).fit()
        except Stopped as stopped:
            # Rank 0 may still be closing its logs, and launchers end a job at the first process
            # that exits with a nonzero status.
            barrier()
            # Its traceback would keep the model, and with it the process group, alive.
            raise stopped.with_traceback(None) from None


class Trainer:
    """Training loop of one run in one process, driving a LightningModule through Fabric.

    Every rank creates it, after the process group. Reading, growing and writing checkpoints happens
    on rank 0.

    Args:
        config: the run.
        tokens: tokens to train on.
        fabric: devices of the run.
        console: receives progress.

    Raises:
        UserError: the ranks have different tokens, or the config cannot start or resume the run.
    """

    stage: Stage
    """Current stage."""

    def __init__(
        self, config: TrainConfig, tokens: TokenSource, fabric: Fabric, console: Console
    ) -> None:
        config.check_world_size(fabric.world_size)
        _check_same_tokens(tokens)
        # `out` may contain the time of day, which differs between ranks.
        self.config = config = replace(config, out=broadcast_from_rank0(lambda: config.out))
        self.tokens, self.tokenizer = tokens, tokens.tokenizer()
        self.fabric, self.console = fabric, console
        self.out = Path(config.out)
        self.stop = StopRequest()
        self.state, self.checkpoint = broadcast_from_rank0(
            lambda: find_start(config, tokens), _without_tensors
        )
        self.resumed = bool(self.state.rungs)
        self.writer = CheckpointWriter(self.out, config.keep_checkpoints, console)
        logger_config = config.logger if fabric.is_global_zero else NO_LOGGERS
        self.loggers = LoggerCollection(logger_config, self.out)
        self.wall_time = self._start_clock()

    def fit(self) -> FitResult:
        """Train all stages that are not finished.

        Returns:
            The final state and the last checkpoint.

        Raises:
            UserError: as `tokengrow.fit`.
            Stopped: SIGTERM was received; everything trained is saved.
        """
        try:
            with ExitStack() as stack:
                broadcast_from_rank0(lambda: self._open_run(stack))
                for context in (self.loggers, self.writer, self.stop):
                    stack.enter_context(context)
                return self._train_stages()
        except KeyboardInterrupt:  # handled after a started write has ended
            raise KeyboardInterrupt(resume_hint(self.out)) from None

    def _train_stages(self) -> FitResult:
        if self.resumed:
            self._print(status_line(self.config, self.state))
        remaining = self.config.stages[len(self.state.stage_ends) :]
        if remaining:
            broadcast_from_rank0(lambda: self.loggers.open(self.config.to_dict()))
        for config in remaining:
            if self.stop.requested():  # everything is saved, and a growth may take long
                raise Stopped(
                    f"stopped by SIGTERM before stage {config.name}; {resume_hint(self.out)}"
                )
            with explain_out_of_memory(self.config, config, device_name(self.fabric.device)):
                self._enter_stage(config)
                self.checkpoint = None  # frees its memory and its files
                self.train_stage()
            unregister_module(self.fabric, self.stage.module)
            self._leave_stage()
            del self.stage  # frees the model before the next one is built
        assert self.checkpoint is not None, "a finished run has a checkpoint"
        return FitResult(self.state, self.checkpoint)

    def train_stage(self) -> None:
        """Train until the current stage ends; validate, log and save on the way."""
        config, state, stage = self.config, self.state, self.stage.config
        sequences = self._sequences(stage, "train")
        batches = train_batches(config, self.fabric, sequences, state.next_batch)
        tokens_per_step = config.batch_size * stage.model.context_length
        flops_per_token = stage.model.flops_per_token()
        precision = config.fabric.chosen_precision
        throughput = Throughput(self.fabric, precision, flops_per_token)
        with stage_progress(self.console, stage.name, state.stage_step, stage.steps) as progress:
            ended = False
            while not ended:
                self._stop_if_requested()
                self._compile_if_settled()
                loss, grad_norm, lr = self.train_step(batches)
                state.advance(tokens_per_step, flops_per_token)
                self.stage.anneal_tau(state)
                throughput.add(tokens_per_step)
                step = state.stage_step
                ended = step == stage.steps
                if ended or self._should_sync(step):
                    self._count_skipped()
                if ended or step % config.log_every == 0:
                    self._log_step(progress, loss, grad_norm, lr, throughput.read())
                if ended or step % config.validation_every == 0:
                    progress.update_validation(step, self.validate())
                    ended = ended or self._ends_at_plateau()
                    throughput.reset()
                if not ended and step % config.checkpoint_every == 0:
                    self.save(required=False)
                    throughput.reset()

    def train_step(self, batches: Iterator[Tensor]) -> tuple[Tensor, Tensor, float]:
        """Take one optimizer update over a global batch.

        Args:
            batches: micro-batches [b, T + 1] of this rank.

        Returns:
            Mean loss (scalar tensor, nats per token), gradient norm before clipping (scalar
            tensor), and learning rate.
        """
        fabric, stage, optim = self.fabric, self.stage, self.stage.config.optim
        update = self.state.stage_step + 1
        lr = learning_rate(optim, update, stage.config.steps)
        for group in stage.optimizer.param_groups:
            group["lr"] = lr
        parts = self.config.batch_size // (self.config.micro_batch_size * fabric.world_size)
        losses = []
        for part in range(parts):
            batch = next(batches)
            with fabric.no_backward_sync(stage.module, enabled=part < parts - 1):
                # On one device, Fabric calls training_step outside its autocast: enter it here.
                with fabric.autocast():
                    loss = stage.module.training_step(batch, part) / parts
                fabric.backward(poison_nonfinite_grad(loss))
            losses.append(loss.detach())
        stage.adamw.zero_frozen_gradients()
        norm = fabric.clip_gradients(
            stage.module, stage.optimizer, max_norm=optim.grad_clip, error_if_nonfinite=False
        )
        assert norm is not None
        norm = full_tensor(norm)
        stage.adamw.skip_if(stage.gradients.observe(update, norm, torch.stack(losses)))
        stage.optimizer.step()
        stage.optimizer.zero_grad(set_to_none=True)
        return cast(Tensor, sum(losses)), norm, lr

    def validate(self) -> float:
        """Validate the current model; record and log the loss.

        Returns:
            Mean validation loss, nats per token.

        Raises:
            UserError: the loss is not finite.
        """
        sequences = self._sequences(self.stage.config, "validation")
        loss = mean_validation_loss(self.config, self.fabric, sequences, self.stage.module)
        check_validation_loss(loss, self.stage.config, self.state)
        self.state.record_validation(loss)
        self.wall_time.note_validation()
        self._log({"validation/loss": loss})
        return loss

    def save(self, required: bool = True) -> None:
        """Start to write a checkpoint. Rank 0 has a copy of all tensors when this returns.

        Args:
            required: whether a full disk stops the run; otherwise it prints a warning.
        """
        broadcast_from_rank0(self.writer.finish)  # frees the memory of the previous copy
        stage = self.stage
        checkpoint = Checkpoint(
            config=stage.model.config,
            weights=copy_to_host(stage.model.state_dict().items()),
            optimizer=collect_optimizer_state(stage.model, stage.adamw),
            train_state=deepcopy(self.state),  # a thread writes it
            run=RecordedRun.from_dict(self.config.to_dict()),
            lineage=stage.lineage,
            times=self.wall_time.times(),
            tokenizer=self.tokenizer.to_json(),
            end_of_text=self.tokenizer.end_of_text_token,
        )
        if self.fabric.is_global_zero:
            self.writer.save(checkpoint, set(self.state.stage_ends), required)

    # Stage boundaries

    def _enter_stage(self, config: StageConfig) -> None:
        """Set up the next stage; count and validate it unless the run resumes inside it."""
        index, state, previous = self.config.stages.index(config), self.state, self.checkpoint
        if len(state.rungs) > index:  # the run resumes inside this stage
            assert previous is not None
            done = state.stage_updates
            self.stage = setup_stage(self.config, self.fabric, config, previous, state, done)
            return
        rung = Rung(config.name, config.model.num_parameters())
        validation = self._sequences(config, "validation")
        if state.rungs:
            rung.loss_before = state.rungs[-1].loss_end
        elif previous is not None:
            module = load_module(self.config, self.fabric, config, previous)
            rung.loss_before = mean_validation_loss(self.config, self.fabric, validation, module)
            unregister_module(self.fabric, module)
        start = broadcast_from_rank0(
            lambda: starting_checkpoint(self.config, config, previous, validation),
            Checkpoint.without_tensors,
        )
        if previous is not None and len(start.lineage) > len(previous.lineage):
            rung.drift = start.lineage[-1].drift.max_logit
            self._report_growth(previous, rung)
        if tau := anneal_start_tau(start.config, config.model, self.config.growth):
            rung.tau_start = asdict(tau)
        self.stage = setup_stage(self.config, self.fabric, config, start, state, updates_done=0)
        state.enter(index, rung)
        rung.loss_start = self.validate()

    def _report_growth(self, source: Checkpoint, rung: Rung) -> None:
        """Print a growth, and mark it in the logs."""
        assert rung.drift is not None
        text = (
            f"grown {source.config.num_parameters():,} -> {rung.parameters:,} parameters: "
            f"logits moved by at most {rung.drift:.1e}"
        )
        self._print(text)
        self.loggers.log_growth(rung.name, rung.parameters, rung.drift, text, self.state.step)

    def _leave_stage(self) -> None:
        """Write the last checkpoint of the stage, and read back what the next one starts from."""
        self.state.leave(self.state.validation[-1].loss)
        self.save()

        def read_back() -> Checkpoint:
            self.writer.finish()
            return load_checkpoint(self.out / step_folder(self.state.step))

        self.checkpoint = broadcast_from_rank0(read_back, Checkpoint.without_tensors)

    # Steps between updates

    def _open_run(self, stack: ExitStack) -> None:
        """Claim the run directory on rank 0, and record this session if anything is to be done."""
        newest = self.checkpoint if self.resumed else None
        claim_run_directory(self.config, newest, stack, self.console)
        if len(self.state.stage_ends) < len(self.config.stages):
            session = new_session(self.config, self.fabric, self.state.step)
            stack.enter_context(record_session(self.out, session))

    def _start_clock(self) -> WallTime:
        if self.checkpoint is None:
            return WallTime()
        if self.resumed:
            return WallTime.resumed(self.checkpoint.times, len(self.state.validation))
        return WallTime.starting_from(self.checkpoint.times)

    def _stop_if_requested(self) -> None:
        """Save and stop if a process of the run received SIGTERM."""
        if not self.stop.requested():
            return
        state, stage = self.state, self.stage.config
        if state.step and not broadcast_from_rank0(lambda: self.writer.has(state.step)):
            self._count_skipped()
            self.save()
        broadcast_from_rank0(self.writer.finish)
        raise Stopped(
            f"stopped by SIGTERM in stage {stage.name}, step {state.stage_step}/{stage.steps}; "
            f"{resume_hint(self.out)}"
        )

    def _should_sync(self, step: int) -> bool:
        """Return whether to synchronise with the device after an update.

        A GPU works on one update while the host queues the next; a CPU never runs ahead.
        """
        config = self.config
        intervals = config.log_every, config.validation_every, config.checkpoint_every
        return self.fabric.device.type == "cpu" or any(step % every == 0 for every in intervals)

    def _count_skipped(self) -> None:
        """Count and report skipped updates; too many in a row stop the run."""
        # Opened only if its numbers are needed: the order of Megatron samples takes a lock.
        sequences = partial(self._sequences, self.stage.config, "train")
        out = self.out if self.fabric.is_global_zero else None
        line = count_skipped_updates(self.stage.gradients, self.state, self.config, sequences, out)
        if line:
            self._print(line)

    def _compile_if_settled(self) -> None:
        """Compile the blocks once tau is constant, because compiled code holds its value."""
        blocks = self.stage.model.blocks
        if not self.config.compiles or is_compiled(blocks[0]):
            return
        if not self.stage.anneals_tau(self.state):
            self.console.print("compiling the blocks; the first update takes longer")
            compile_blocks(blocks)

    def _ends_at_plateau(self) -> bool:
        """Return whether the plateau rule ends the stage now, and print a line if it does."""
        stage, state = self.stage.config, self.state
        rule = stage.plateau
        if rule is None or not reached_plateau(state.losses(self.stage.settled_at(state)), rule):
            return False
        self._print(
            f"stage {stage.name} ends at a plateau (patience {rule.patience}, min_delta "
            f"{rule.min_delta:g}) after {state.stage_step} of at most {stage.steps} steps"
        )
        return True

    def _sequences(self, stage: StageConfig, split: Split) -> Sequences:
        """Return a split, cut to the context length of a stage."""
        return self.tokens.sequences(split, stage.model.context_length)

    def _log_step(
        self,
        progress: StageProgress,
        loss: Tensor,
        grad_norm: Tensor,
        lr: float,
        throughput: dict[str, float],
    ) -> None:
        metrics = {
            "train/loss": cast(Tensor, self.fabric.all_reduce(loss)).item(),
            "train/grad_norm": grad_norm.item(),
            "train/lr": lr,
            "skipped_steps": self.state.rung.skipped,
            **throughput,
        }
        progress.update(self.state.stage_step, metrics)
        self._log(metrics)

    def _log(self, metrics: Mapping[str, float]) -> None:
        state = self.state
        position = RunPosition(state.tokens, state.flops, state.stage, state.rung.parameters)
        self.loggers.log_metrics(metrics, position, state.step)

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)


def _check_same_tokens(tokens: TokenSource) -> None:
    """Raise `UserError` if another rank has other tokens than rank 0."""
    fingerprints = all_gather_object(tokens.fingerprint)
    for rank, fingerprint in enumerate(fingerprints):
        if fingerprint != fingerprints[0]:
            raise UserError(
                f"Rank {rank} must have the same tokens as rank 0. Make them once with `tokengrow "
                "data`, and give the directory as store=, where every node can read it "
                f"({CLUSTER_GUIDE})."
            )


def _without_tensors(
    start: tuple[TrainState, Checkpoint | None],
) -> tuple[TrainState, Checkpoint | None]:
    """Return what ranks other than 0 need of the start of a run."""
    state, checkpoint = start
    return state, checkpoint and checkpoint.without_tensors()
