"""What happens to a checkpoint between two stages, and in `tokengrow grow`: it is grown and
verified. In `tokengrow prune` it is made smaller, and measured."""

from dataclasses import replace

from torch import Tensor

from tokengrow.checkpoint.store import Checkpoint
from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.engine import Grown, carry_out
from tokengrow.growth.plan import GrowthPlan
from tokengrow.growth.prune import Pruned, prune
from tokengrow.model.config import ModelConfig

KEPT_STATE = ("step", "fingerprint", "next_batch")
"""What of a run's state a checkpoint outside any run still has: how far it was, in which data."""


def grow_checkpoint(
    source: Checkpoint, plan: GrowthPlan, config: GrowthConfig, probe: Tensor | None = None
) -> Checkpoint:
    """The checkpoint after a growth: weights, optimizer state, and one more entry of lineage.

    Args:
        source: what is grown; not modified.
        plan: from its size to a larger one.
        config: how new parameters are born, and how exact the growth must be.
        probe: [B, T + 1] int64 token ids on which sameness is measured; random ones by default.

    Raises:
        DriftError: the result is not the same function.
    """
    return _descendant(source, carry_out(plan, source.weights, source.optimizer, config, probe))


def prune_checkpoint(
    source: Checkpoint, target: ModelConfig, text: Tensor, probe: Tensor
) -> Checkpoint:
    """The checkpoint with fewer parameter tokens, and one more entry of lineage.

    Args:
        source: what is pruned; not modified.
        target: of `plan_pruning`.
        text: [B, T + 1] int64 token ids on which tokens are ranked.
        probe: [B, T + 1] int64 token ids, others than `text`, on which the drift is measured.
    """
    return _descendant(
        source, prune(source.config, target, source.weights, source.optimizer, text, probe)
    )


def _descendant(source: Checkpoint, made: Grown | Pruned) -> Checkpoint:
    """The checkpoint of what was made of `source`: its lineage is one entry longer."""
    entry = {
        "source": source.ancestor(),
        "target": {
            "parameters": made.config.num_parameters(),
            "config": made.config.to_dict(),
        },
        **made.report,
    }
    return replace(
        source,
        config=made.config,
        weights=made.weights,
        optimizer=made.optimizer,
        lineage=[*source.lineage, entry],
        train_state={k: v for k, v in source.train_state.items() if k in KEPT_STATE},
        folder=None,
    )
