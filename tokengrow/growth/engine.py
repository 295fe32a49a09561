"""The growth engine: carries out a plan on weights and optimizer state, then measures what it
did."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tokengrow.checkpoint.schema import Drift
from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.depth import deepen
from tokengrow.growth.heads import add_heads
from tokengrow.growth.moments import grown_moments
from tokengrow.growth.plan import GrowthPlan, plan_growth
from tokengrow.growth.tensors import State, generator_for
from tokengrow.growth.tokens import append_tokens
from tokengrow.growth.verify import (
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

Operator = Callable[[State, ModelConfig, ModelConfig, GrowthConfig, int], State]

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
    """Flat optimizer state: moments, if the source had any and they are carried, and ages."""
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
    plan = plan_growth(model.config, target, config=config or GrowthConfig())
    grown = apply_growth(plan, model.to_weights(), {}, probe)
    return TokenFormer.from_weights(grown.config, grown.weights)


def apply_growth(
    plan: GrowthPlan,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    probe: Tensor | None = None,
) -> Grown:
    """Carries out a plan on weights and optimizer state, measures the drift, refuses past
    tolerance.

    Args:
        plan: what to do.
        weights: state dict of the source, on the CPU; not modified.
        optimizer: flat optimizer state of the source, or empty; not modified.
        probe: [B, T + 1] int64 token ids; random ones by default.

    Raises:
        DriftError: the result is not the same function.
    """
    grown = dict(grown_weights(plan, weights))
    drift = verify_growth(plan, weights, grown, probe)
    moments = dict(grown_moments(plan, optimizer))
    return Grown(plan.target, grown, moments, growth_report(plan, drift))


def grown_weights(plan: GrowthPlan, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The weights of the target, tensor by tensor; verified by nobody yet.

    Args:
        plan: what to do.
        weights: of the source, on the CPU, each looked at once; not modified.

    Yields:
        (name, tensor). A tensor that does not grow is that of the source.
    """
    for name in weights:
        grown = {name: weights[name]}
        if _rounds(plan):
            grown = {name: _at_least_float32(grown[name])}
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
    """Measures source against grown weights on a probe batch, one model in memory after the other.

    Raises:
        DriftError: they are further apart than the tolerance.
    """
    if probe is None:
        seed = _seed(plan.source, plan.config.seed)
        probe = random_probe(plan.source, generator_for(seed, "probe"))
    dtype = probe_dtype(plan.target)
    inputs, targets = probe[:, :-1], probe[:, 1:]
    before = logits_of(plan.source, weights, dtype, inputs)
    after = logits_of(plan.target, grown, dtype, inputs)
    drift = compare_logits(before, after, targets)
    limit = plan.config.tolerance
    if limit is None:
        limit = exactness(dtype_of(grown), dtype, _rounds(plan))
    check_drift(drift, limit)
    return drift


def growth_report(plan: GrowthPlan, drift: Drift) -> dict[str, Any]:
    """What happened: the steps, how new parameters were born, and how far the function moved."""
    return {
        "steps": [{"axis": step.axis, "changes": step.changes} for step in plan.steps],
        **asdict(plan.config),
        "drift": drift.to_dict(),
    }


ROUNDING = {"width", "heads"}
"""Axes that compute new numbers from old ones: means of rows, products with a root."""


def _rounds(plan: GrowthPlan) -> bool:
    return plan.config.init == "gram" or any(step.axis in ROUNDING for step in plan.steps)


def _at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision would round those numbers too coarsely for the function to stay."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _seed(source: ModelConfig, seed: int) -> int:
    """A seed of its own for each source size.

    With the bare seed two growths in a row would draw the same values; with zero keys beside them
    the new tokens would be twins, and twins have the same gradients for ever.
    """
    sizes = source.layers, source.width, source.heads, source.head_dim, *source.tokens.items()
    digest = hashlib.sha256(f"{seed}:{sizes}".encode()).digest()
    return int.from_bytes(digest[:7])
