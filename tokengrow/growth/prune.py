"""Pruning: removal of the parameter tokens that contribute least on a text.

The contribution of a token is the mean of `f_n² ‖v_n‖²` over the positions of the text, where
`f_n v_n` is the change of the layer's output if only this token is removed
(`tokengrow.model.activity`). Removing a set S changes the output by the squared length

    ‖Σ_S f_n v_n‖² = Σ_S f_n² ‖v_n‖² + 2 Σ_{n<m in S} f_n f_m (v_n · v_m),

and the first sum is smallest if the largest contributions stay. Tokens are therefore ranked by
contribution, separately in each layer and role. The ranking ignores three effects. The second sum
(cross terms) cancels on average where weights are uncorrelated or values orthogonal. Later layers
transform the change. `l2_norm_gelu` and the other activations divide by a sum over all tokens, so
removing tokens raises the weights of the others. tau compensates for this last effect. Token n has
a share of the sum of squares (of the scores in `l2_norm_gelu`, of the outputs of the GELU in
`gelu_l2_norm`; of exponentials in `softmax`), and each weight is a function of tau² over that sum.
The new tau is

    tau'² = tau² (1 - mean share of the removed tokens),

with the mean over positions and layers, because tau is one number per role. The kept tokens have
the same weights on average, though not at each position. Tokens with large negative scores
contribute nothing and have a large share of the sum. The output projection has many of them, and
the ranking is poor there. Neither the ranking nor tau is exact: `docs/results/prune.md` has the
figures.

A zero key scores 0. With a GELU it contributes nothing and has no share, so a growth by zero keys
is undone bit for bit.

Shapes: `B` batch, `T` sequence, `N` parameter tokens.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokengrow.checkpoint.schema import Drift
from tokengrow.checkpoint.tensors import StateDict
from tokengrow.errors import UserError
from tokengrow.growth.moments import COLUMN_AGE
from tokengrow.growth.plan import INHERITED_FIELDS
from tokengrow.growth.tensors import pattention_name
from tokengrow.growth.verify import measure_drift
from tokengrow.model.activity import Activity, Layer, measure_activity
from tokengrow.model.config import ROLES, ModelConfig, Taus
from tokengrow.model.tokenformer import TokenFormer


@dataclass(frozen=True)
class AppliedPruning:
    """Weights, optimizer state and report after a pruning."""

    config: ModelConfig
    """Config of the pruned model."""
    weights: StateDict
    """State dict on the CPU, in the precision of its source."""
    optimizer: StateDict
    """Flat optimizer state; empty if none was given."""
    report: dict[str, Any]
    """Steps, kept contribution and drift: one entry of a lineage."""
    kept: dict[Layer, Tensor]
    """Indices of the kept tokens of each layer, int64 [N of the pruned model]."""


def plan_pruning(source: ModelConfig, requested: ModelConfig) -> ModelConfig:
    """Return the config of the source with the requested parameter tokens and unchanged tau.

    Args:
        source: config of the model before the pruning.
        requested: requested sizes. `INHERITED_FIELDS` are taken from the source.

    Raises:
        UserError: the target is larger, differs in more than tokens, or equals the source.
    """
    for key, (before, after) in source.differences(requested).items():
        field = key.partition(".")[0]
        if field in INHERITED_FIELDS:
            continue
        if field != "tokens":
            raise UserError(
                f"model.{key} must stay {before}, got {after}. Pruning removes only parameter "
                f"tokens. Set model.{key}={before}."
            )
        if after > before:
            raise UserError(
                f"model.{key} must be at most {before}, got {after}. Pruning never makes a model "
                f"larger. Set model.{key}={before} or less, or use `tokengrow grow`."
            )
    if requested.tokens == source.tokens:
        raise UserError(
            "model must be smaller than source, got the same sizes. Set a smaller one, for example "
            f"model.tokens.ffn={max(1, source.tokens.ffn // 2)}."
        )
    return replace(source, tokens=requested.tokens)


def apply_pruning(
    source: ModelConfig,
    target: ModelConfig,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    text: Tensor,
    probe: Tensor,
) -> AppliedPruning:
    """Remove parameter tokens and measure the drift.

    Args:
        source: config before.
        target: config that `plan_pruning` returned.
        weights: state dict of the source, on the CPU; not modified.
        optimizer: flat optimizer state of the source, or empty; not modified.
        text: [B, T + 1] int64 token ids on which tokens are ranked.
        probe: [B, T + 1] int64 token ids, different from `text`, on which the drift is measured.
    """
    activity = measure_activity(source, weights, text[:, :-1])
    kept = select_tokens(activity, target)
    config = replace(target, tau=rescaled_tau(activity, kept, target))
    rows = rows_by_name(kept)
    smaller = select_rows(weights, rows)
    before = TokenFormer.from_weights(source, weights, torch.float32)
    drift = pruning_drift(before, TokenFormer.from_weights(config, smaller, torch.float32), probe)
    report = {
        "operation": "prune",
        "steps": [{"axis": "tokens", "changes": source.differences(config)}],
        "text_tokens": text[:, :-1].numel(),
        "kept_contribution": kept_contribution(activity, kept),
        "drift": asdict(drift),
    }
    moments = select_optimizer_rows(optimizer, rows, weights)
    return AppliedPruning(config, smaller, moments, report, kept)


def select_tokens(activity: Mapping[Layer, Activity], target: ModelConfig) -> dict[Layer, Tensor]:
    """Return the indices of the tokens to keep in each layer, ascending int64 [N of the target].

    Of tokens with equal contributions, the earlier one is kept.
    """
    kept = {}
    for (number, role), each in activity.items():
        order = each.contribution.argsort(descending=True, stable=True)
        kept[number, role] = order[: getattr(target.tokens, role)].sort().values
    return kept


def rescaled_tau(
    activity: Mapping[Layer, Activity], kept: Mapping[Layer, Tensor], config: ModelConfig
) -> Taus:
    """Return tau of each role after the pruning, by the formula in the docstring of this module."""
    taus = {}
    for role, tau in asdict(config.tau).items():
        shares = [
            _removed_sum(activity[layer].share, kept[layer]) for layer in kept if layer[1] == role
        ]
        # If all kept tokens score 0, no scale is right, and tau stays.
        factor = math.sqrt(max(0.0, 1 - sum(shares) / len(shares))) or 1.0
        taus[role] = tau * factor
    return Taus(**taus)


def _removed_sum(amounts: Tensor, kept: Tensor) -> float:
    """Sum the amounts of removed tokens; exactly 0 if there are none, or if all are 0."""
    removed = torch.ones(len(amounts), dtype=torch.bool)
    removed[kept] = False
    return amounts[removed].sum().item()


def kept_contribution(
    activity: Mapping[Layer, Activity], kept: Mapping[Layer, Tensor]
) -> dict[str, float]:
    """Return the share of the total contribution that is kept, for each role that lost tokens."""
    shares = {}
    for role in ROLES:
        layers = [layer for layer in kept if layer[1] == role]
        if all(len(kept[layer]) == len(activity[layer].contribution) for layer in layers):
            continue
        total = sum(activity[layer].contribution.sum().item() for layer in layers)
        removed = sum(_removed_sum(activity[layer].contribution, kept[layer]) for layer in layers)
        shares[role] = 1 - removed / total if total else 1.0
    return shares


def rows_by_name(kept: Mapping[Layer, Tensor]) -> dict[str, Tensor]:
    """Map the name of every parameter-token tensor to its rows to keep."""
    return {
        pattention_name(number, role, part): rows
        for (number, role), rows in kept.items()
        for part in ("key", "value")
    }


def select_rows(state: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> StateDict:
    """Keep only the given rows of named tensors; other tensors are shared with `state`."""
    return {name: t[rows[name]] if name in rows else t for name, t in state.items()}


def select_optimizer_rows(
    optimizer: Mapping[str, Tensor], rows: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> StateDict:
    """Keep only the optimizer state of the kept tokens, in every slot with one entry per row.

    Args:
        optimizer: flat state, `{slot}.{parameter name}`; not modified.
        rows: parameter name to its rows to keep, as `rows_by_name` returns it.
        weights: weights of the source.
    """
    smaller = dict(optimizer)
    for key, tensor in optimizer.items():
        slot, _, name = key.partition(".")
        if name in rows and slot != COLUMN_AGE and tensor.shape[:1] == weights[name].shape[:1]:
            smaller[key] = tensor[rows[name]]
    return smaller


def pruning_drift(source: TokenFormer, pruned: TokenFormer, probe: Tensor) -> Drift:
    """Measure the drift one sequence at a time; `relative` is that of the worst sequence.

    Args:
        source: model on the CPU, in float32.
        pruned: model on the CPU, in float32.
        probe: [B, T + 1] int64 token ids.
    """
    each = [measure_drift(source, pruned, sequence) for sequence in torch.split(probe, 1)]

    def mean(key: str) -> float:
        values: list[float] = [getattr(drift, key) for drift in each]
        return sum(values) / len(each)

    return Drift(
        dtype=each[0].dtype,
        probe_tokens=sum(drift.probe_tokens for drift in each),
        max_logit=max(drift.max_logit for drift in each),
        mean_logit=mean("mean_logit"),
        relative=max(drift.relative for drift in each),
        kl=mean("kl"),
        loss_source=mean("loss_source"),
        loss_grown=mean("loss_grown"),
    )
