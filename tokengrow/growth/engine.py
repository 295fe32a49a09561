"""The growth engine: carries out a plan on weights and optimizer state, then measures what it
did."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.depth import deepen
from tokengrow.growth.heads import add_heads
from tokengrow.growth.moments import grow_moments
from tokengrow.growth.plan import GrowthPlan, plan_growth
from tokengrow.growth.tensors import State
from tokengrow.growth.tokens import append_tokens
from tokengrow.growth.verify import (
    Drift,
    check_drift,
    compare_logits,
    exactness,
    logits_of,
    probe_dtype,
    random_probe,
)
from tokengrow.growth.width import widen
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import TokenFormer, dtype_of

Operator = Callable[[State, ModelConfig, ModelConfig, GrowthConfig, torch.Generator], State]

OPERATORS: dict[str, Operator] = {
    "width": widen,
    "heads": add_heads,
    "tokens": append_tokens,
    "depth": deepen,
}
"""Growth axis to the pure function that grows weights along it."""


@dataclass(frozen=True)
class Grown:
    """What a growth gives."""

    config: ModelConfig
    """Of the grown model."""
    weights: State
    """State dict on the CPU, in the precision of its source (at least float32 if width or heads
    grew)."""
    optimizer: State
    """Flat optimizer state, empty if none was given."""
    report: dict[str, Any]
    """What happened: steps, seed, drift; one entry of a lineage."""


def grow(
    model: TokenFormer,
    target: ModelConfig,
    config: GrowthConfig | None = None,
    probe: Tensor | None = None,
) -> TokenFormer:
    """A larger model that computes the same function.

    Args:
        model: the source; not modified.
        target: the sizes wanted, nowhere smaller than the source's; tau and rotary channels stay
            the source's.
        config: how new parameters are born.
        probe: [B, T + 1] int64 token ids on which sameness is measured; random ones by default.

    Returns:
        The grown model on the CPU, in the precision of the source (half precision becomes float32
        where width or heads grow).

    Raises:
        UserError: a target that cannot be reached.
        DriftError: a result that is not the same function.
    """
    config = config or GrowthConfig()
    plan = plan_growth(model.config, target, tau=config.tau)
    grown = carry_out(plan, model.to_weights(), {}, config, probe)
    return TokenFormer.from_weights(grown.config, grown.weights)


def carry_out(
    plan: GrowthPlan,
    weights: State,
    optimizer: State,
    config: GrowthConfig,
    probe: Tensor | None = None,
) -> Grown:
    """Carries out a plan on weights and optimizer state, measures the drift, refuses past
    tolerance.

    Args:
        plan: what to do.
        weights: state dict of the source, on the CPU; not modified.
        optimizer: flat optimizer state of the source, or empty; not modified.
        config: how new parameters are born.
        probe: [B, T + 1] int64 token ids; random ones by default.

    Raises:
        UserError: an axis that `config` does not grow.
        DriftError: the result is not the same function.
    """
    config.check_axes([step.axis for step in plan.steps])
    generator, grown = _generator(plan, config.seed), weights
    if _rounds(plan):
        grown = {name: _at_least_float32(tensor) for name, tensor in weights.items()}
    for step in plan.steps:
        operator = OPERATORS[step.axis]
        grown = operator(grown, step.source, step.target, config, generator)
    drift = verify_growth(plan, weights, grown, config, probe)
    report = {
        "steps": [{"axis": step.axis, "changes": step.changes} for step in plan.steps],
        **asdict(config),
        "drift": drift.to_dict(),
    }
    moments = grow_moments(optimizer, plan) if config.optimizer == "carry" else {}
    return Grown(plan.target, grown, moments, report)


def verify_growth(
    plan: GrowthPlan,
    weights: State,
    grown: State,
    config: GrowthConfig,
    probe: Tensor | None = None,
) -> Drift:
    """Measures source against grown weights on a probe batch, one model in memory after the other.

    Raises:
        DriftError: they are further apart than the tolerance.
    """
    if probe is None:
        probe = random_probe(plan.source, _generator(plan, config.seed))
    dtype = probe_dtype(plan.target)
    inputs, targets = probe[:, :-1], probe[:, 1:]
    before = logits_of(plan.source, weights, dtype, inputs)
    after = logits_of(plan.target, grown, dtype, inputs)
    drift = compare_logits(before, after, targets)
    limit = config.tolerance
    if limit is None:
        limit = exactness(dtype_of(grown), dtype, _rounds(plan))
    check_drift(drift, limit)
    return drift


ROUNDING = {"width", "heads"}
"""Axes that compute new numbers from old ones: means of rows, products with a root."""


def _rounds(plan: GrowthPlan) -> bool:
    return any(step.axis in ROUNDING for step in plan.steps)


def _at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision would round those numbers too coarsely for the function to stay."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _generator(plan: GrowthPlan, seed: int) -> torch.Generator:
    """A stream of its own for each source size.

    With the bare seed two growths in a row would draw the same values; with zero keys beside them
    the new tokens would be twins, and twins have the same gradients for ever.
    """
    source = plan.source
    sizes = source.layers, source.width, source.heads, source.head_dim, *source.tokens.items()
    digest = hashlib.sha256(f"{seed}:{sizes}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))
