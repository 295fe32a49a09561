"""What happens to a checkpoint between two stages, and in `tokengrow grow`: it is grown and
verified."""

from dataclasses import replace

from torch import Tensor

from tokengrow.checkpoint.store import Checkpoint
from tokengrow.growth.engine import carry_out
from tokengrow.growth.plan import GrowthPlan

KEPT_STATE = ("step", "fingerprint", "next_batch")
"""What of a run's state a checkpoint outside any run still has: how far it was, in which data."""


def grow_checkpoint(
    source: Checkpoint, plan: GrowthPlan, probe: Tensor | None = None
) -> Checkpoint:
    """The checkpoint after a growth: weights, optimizer state, and one more entry of lineage.

    Args:
        source: what is grown; not modified.
        plan: from its size to a larger one.
        probe: [B, T + 1] int64 token ids on which sameness is measured; random ones by default.

    Raises:
        DriftError: the result is not the same function.
    """
    grown = carry_out(plan, source.weights, source.optimizer, probe)
    entry = {
        "source": source.ancestor(),
        "target": {
            "parameters": plan.target.num_parameters(),
            "config": plan.target.to_dict(),
        },
        **grown.report,
    }
    return replace(
        source,
        config=grown.config,
        weights=grown.weights,
        optimizer=grown.optimizer,
        lineage=[*source.lineage, entry],
        train_state={k: v for k, v in source.train_state.items() if k in KEPT_STATE},
        folder=None,
    )
