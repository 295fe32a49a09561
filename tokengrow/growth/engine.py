"""Execution of a growth plan on weights and optimizer state, and measurement of its drift."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tokengrow.checkpoint.schema import Drift
from tokengrow.checkpoint.tensors import StateDict
from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.depth import grow_depth
from tokengrow.growth.heads import grow_heads
from tokengrow.growth.moments import grow_optimizer_state
from tokengrow.growth.plan import GrowthPlan
from tokengrow.growth.tensors import generator_for
from tokengrow.growth.tokens import grow_tokens
from tokengrow.growth.verify import (
    check_drift,
    compare_logits,
    compute_logits,
    default_tolerance,
    probe_dtype,
    random_probe,
)
from tokengrow.growth.width import grow_width
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import dtype_of

Operator = Callable[[StateDict, ModelConfig, ModelConfig, GrowthConfig, int], StateDict]

OPERATORS: dict[str, Operator] = {
    "width": grow_width,
    "heads": grow_heads,
    "tokens": grow_tokens,
    "depth": grow_depth,
}
"""Growth axis to the pure function that grows weights along it."""

ROUNDED_AXES = {"width", "heads"}
"""Axes that compute new numbers from old ones: means of rows, products with a square root."""


@dataclass(frozen=True)
class AppliedGrowth:
    """Weights, optimizer state and report after a growth."""

    config: ModelConfig
    """Config of the grown model."""
    weights: StateDict
    """State dict on the CPU, in the precision of the source; at least float32 if width or heads
    grew."""
    optimizer: StateDict
    """Flat optimizer state: ages, and moments if the source had any and they are carried."""
    report: dict[str, Any]
    """Steps, settings and drift: one entry of a lineage."""


def apply_growth(
    plan: GrowthPlan,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    probe: Tensor | None = None,
) -> AppliedGrowth:
    """Execute a plan on weights and optimizer state, and measure the drift.

    Args:
        plan: the growth.
        weights: state dict of the source, on the CPU; not modified.
        optimizer: flat optimizer state of the source, or empty; not modified.
        probe: [B, T + 1] int64 token ids; random ones by default.

    Raises:
        DriftError: the grown model is not the same function.
    """
    grown = dict(grow_weights(plan, weights))
    drift = verify_growth(plan, weights, grown, probe)
    moments = dict(grow_optimizer_state(plan, optimizer))
    return AppliedGrowth(plan.target, grown, moments, growth_report(plan, drift))


def grow_weights(plan: GrowthPlan, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of the target, tensor by tensor, without verification.

    Args:
        plan: the growth.
        weights: weights of the source, on the CPU, each read once; not modified.

    Yields:
        (name, tensor). A tensor that does not grow is that of the source.
    """
    for name in weights:
        tensor = weights[name]
        if _is_rounded(plan):
            # Half precision would round the computed numbers too coarsely for an exact growth.
            tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        grown = {name: tensor}
        for step in plan.steps:
            operator, seed = OPERATORS[step.axis], _seed(step.source, plan.config.seed)
            grown = operator(grown, step.source, step.target, plan.config, seed)
        yield from grown.items()


def verify_growth(
    plan: GrowthPlan,
    weights: Mapping[str, Tensor],
    grown: Mapping[str, Tensor],
    probe: Tensor | None = None,
) -> Drift:
    """Measure the drift on a probe batch, with one model in memory at a time.

    Args:
        plan: the growth.
        weights: weights of the source, on the CPU.
        grown: weights of the grown model, on the CPU.
        probe: [B, T + 1] int64 token ids; random ones by default.

    Raises:
        DriftError: the drift exceeds the tolerance.
    """
    if probe is None:
        seed = _seed(plan.source, plan.config.seed)
        probe = random_probe(plan.source, generator_for(seed, "probe"))
    dtype = probe_dtype(plan.target)
    inputs, targets = probe[:, :-1], probe[:, 1:]
    before = compute_logits(plan.source, weights, dtype, inputs)
    after = compute_logits(plan.target, grown, dtype, inputs)
    drift = compare_logits(before, after, targets)
    limit = plan.config.tolerance
    if limit is None:
        limit = default_tolerance(dtype_of(grown), dtype, _is_rounded(plan))
    check_drift(drift, limit)
    return drift


def growth_report(plan: GrowthPlan, drift: Drift) -> dict[str, Any]:
    """Return the steps, the growth settings and the drift, as an entry of a lineage."""
    return {
        "steps": [{"axis": step.axis, "changes": step.changes} for step in plan.steps],
        **asdict(plan.config),
        "drift": drift.to_dict(),
    }


def _is_rounded(plan: GrowthPlan) -> bool:
    """Return whether the growth computes new numbers from old ones."""
    return plan.config.init == "gram" or any(step.axis in ROUNDED_AXES for step in plan.steps)


def _seed(source: ModelConfig, seed: int) -> int:
    """Derive a different seed for each source size.

    With the same seed, two growths in a row would draw the same values. Next to zero keys, the new
    tokens would be parallel, and parallel tokens have the same gradients forever.
    """
    sizes = source.layers, source.width, source.heads, source.head_dim, *source.tokens.items()
    digest = hashlib.sha256(f"{seed}:{sizes}".encode()).digest()
    return int.from_bytes(digest[:7])
