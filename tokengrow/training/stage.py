"""One stage of a run on its devices: wrapped model, optimizer and gradient monitor."""

import gc
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from lightning.fabric import Fabric

from tokengrow.checkpoint.schema import LineageEntry, TrainState
from tokengrow.checkpoint.store import Checkpoint
from tokengrow.data.loader import probe_batch
from tokengrow.data.sequences import Sequences
from tokengrow.distributed.collectives import scatter_from_rank0, to_local
from tokengrow.distributed.parallelize import (
    apply_activation_checkpointing,
    local_optimizer,
    shard_optimizer,
)
from tokengrow.growth.checkpoint import grow_checkpoint
from tokengrow.growth.plan import plan_growth
from tokengrow.model.architectures import build_model
from tokengrow.model.config import ModelConfig, Taus
from tokengrow.model.tokenformer import LanguageModel, TokenFormer, fastest_attention
from tokengrow.optim.adamw import AgedAdamW
from tokengrow.optim.state import load_optimizer_state
from tokengrow.training.config import StageConfig, TrainConfig
from tokengrow.training.module import TokenFormerModule
from tokengrow.training.nonfinite import GradientMonitor


@dataclass(frozen=True)
class Stage:
    """The current stage, set up by Fabric."""

    config: StageConfig
    """Model size, duration and optimizer settings."""
    module: Any
    """TokenFormerModule in Fabric's wrapper."""
    model: LanguageModel
    """Model inside the module."""
    optimizer: Any
    """Optimizer in Fabric's wrapper."""
    adamw: AgedAdamW
    """Optimizer of this rank's parameters: the wrapped one, or its shard."""
    lineage: tuple[LineageEntry, ...]
    """Growths and prunings of the model."""
    gradients: GradientMonitor
    """Monitor of non-finite gradients."""
    anneal_steps: int
    """Updates over which tau is annealed, if it is."""

    def anneals_tau(self, state: TrainState) -> bool:
        """Return whether tau still changes."""
        return state.rung.tau_start is not None and state.stage_step < self.anneal_steps

    def anneal_tau(self, state: TrainState) -> None:
        """Move tau from the value of the source to that of the stage, where it is annealed."""
        if state.rung.tau_start is not None:
            model, end = cast(TokenFormer, self.model), cast(ModelConfig, self.config.model)
            share = state.stage_step / self.anneal_steps
            model.set_tau(Taus(**state.rung.tau_start).interpolate(end.tau, share))

    def settled_at(self, state: TrainState) -> float:
        """Return the update of the stage, from 1, after which learning rate and tau are settled."""
        annealed = self.anneal_steps if state.rung.tau_start is not None else 1
        return max(annealed, self.config.optim.warmup, 1)


def starting_checkpoint(
    config: TrainConfig,
    stage: StageConfig,
    previous: Checkpoint | None,
    validation: Sequences,
) -> Checkpoint:
    """Return initial weights, or the previous checkpoint grown to the size of a stage.

    Args:
        config: seed and growth settings.
        stage: the stage.
        previous: checkpoint before the stage; None: start from initial weights.
        validation: sequences on which the growth is verified.

    Raises:
        DriftError: the grown model is not the same function.
    """
    if previous is None:
        model = build_model(stage.model)
        model.init_weights(torch.Generator().manual_seed(config.seed))
        return Checkpoint.of(model)
    growth = replace(config.growth, seed=config.growth.seed + config.seed)
    plan = plan_growth(previous.config, stage.model, config=growth)
    return grow_checkpoint(previous, plan, probe_batch(validation)) if plan.steps else previous


def load_module(
    config: TrainConfig, fabric: Fabric, stage: StageConfig, checkpoint: Checkpoint
) -> Any:
    """Put the model of a checkpoint on the devices.

    Args:
        config: the run.
        fabric: its devices.
        stage: settings of the optimizer and the schedule.
        checkpoint: config on every rank, weights on rank 0.

    Returns:
        A TokenFormerModule in Fabric's wrapper.
    """
    # Fabric chooses the precision of the weights, whatever the checkpoint holds.
    with fabric.init_module(empty_init=True):
        model = build_model(checkpoint.config).train()
    model.set_kernel(config.kernel)
    apply_activation_checkpointing(
        model.blocks, config.fabric.activation_checkpointing, fastest_attention
    )
    module = fabric.setup_module(TokenFormerModule(model, stage.optim, stage.steps))
    for name, parameter in model.state_dict().items():
        weight = scatter_from_rank0(parameter, checkpoint.weights.get(name))
        to_local(parameter).copy_(to_local(weight))
    return module


def setup_stage(
    config: TrainConfig,
    fabric: Fabric,
    stage: StageConfig,
    checkpoint: Checkpoint,
    state: TrainState,
    updates_done: int,
) -> Stage:
    """Set up model and optimizer, in the order that FSDP2 needs.

    Args:
        config: the run.
        fabric: its devices.
        stage: the stage.
        checkpoint: weights and optimizer state, on rank 0.
        state: counters of the run.
        updates_done: updates of this stage that the checkpoint already had.
    """
    gc.collect()  # Fabric's wrappers form cycles, and this model needs their memory
    module = load_module(config, fabric, stage, checkpoint)
    optimizer = module.configure_optimizers()["optimizer"]
    if config.fabric.zero1 and fabric.world_size > 1:
        optimizer = shard_optimizer(optimizer)
    adamw = local_optimizer(optimizer)
    assert isinstance(adamw, AgedAdamW)
    load_optimizer_state(module.model, adamw, checkpoint.optimizer)
    adamw.begin_stage(config.growth, updates_done)
    return Stage(
        config=stage,
        module=module,
        model=module.model,
        optimizer=fabric.setup_optimizers(optimizer),
        adamw=adamw,
        lineage=checkpoint.lineage,
        gradients=GradientMonitor(fabric.device, config.max_skipped_steps, state.skipped_in_a_row),
        anneal_steps=min(config.growth.anneal_steps, stage.steps),
    )
