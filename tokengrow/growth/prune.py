"""Back along the tokens axis: fewer parameter tokens, those kept that contribute most on a text.

A token's contribution is the mean of `f_n² ‖v_n‖²` over the positions of the text, what its own
absence would move the layer's output by (`tokengrow.model.activity`). Taking a set S away moves the
output by the squared length

    ‖Σ_S f_n v_n‖² = Σ_S f_n² ‖v_n‖² + 2 Σ_{n<m in S} f_n f_m (v_n · v_m),

and the first sum is smallest if the largest contributions stay. So tokens are ranked by
contribution, in each layer and role alone. The ranking ignores the second sum (cross terms, which
cancel on average where weights are uncorrelated or values orthogonal), what later layers make of
the move, and that `l2_norm_gelu` and its kin divide by a sum over all tokens: without some of them
the others weigh more. That last is answered in tau. Token n holds a share of the sum of squares (of
the scores in `l2_norm_gelu`, of what the GELU gives in `gelu_l2_norm`; of exponentials in
`softmax`), and each weight is a function of tau² over that sum. So

    tau'² = tau² (1 - mean share of what is dropped),

the mean over positions and layers, since tau is one number per role: the kept tokens weigh on
average what they did, though not at each position. Tokens with large negative scores contribute
nothing and hold much of the sum; the output projection has many, and ranking is poor there. Neither
is exact: `docs/results/prune.md` has the figures.

A zero key scores 0: with a GELU it contributes nothing and holds no share, so that growth by zero
keys is undone bit for bit.

Shapes: `B` batch, `T` sequence, `N` parameter tokens.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokengrow.checkpoint.schema import Drift
from tokengrow.errors import UserError
from tokengrow.growth.moments import COLUMN_AGE
from tokengrow.growth.plan import KEPT
from tokengrow.growth.tensors import State, pattention_name
from tokengrow.growth.verify import measure_drift
from tokengrow.model.activity import Activity, Layer, measure_activity
from tokengrow.model.config import ROLES, ModelConfig, Taus
from tokengrow.model.tokenformer import TokenFormer


@dataclass(frozen=True)
class Pruned:
    """What a pruning gives."""

    config: ModelConfig
    """Of the pruned model."""
    weights: State
    """State dict on the CPU, in the precision of its source."""
    optimizer: State
    """Flat optimizer state, empty if none was given."""
    report: dict[str, Any]
    """What happened: steps, contribution kept, drift; one entry of a lineage."""
    kept: dict[Layer, Tensor]
    """Indices of the tokens that stayed in each layer, int64 [N of the pruned model]."""


def plan_pruning(source: ModelConfig, requested: ModelConfig) -> ModelConfig:
    """The source's config with the parameter tokens that are wanted; tau is the source's still.

    Args:
        source: the model at hand.
        requested: the sizes wanted. What is not a size (`KEPT`) is taken from the source.

    Raises:
        UserError: a target that is larger, that differs in more than tokens, or that is the source.
    """
    for key, (before, after) in source.differences(requested).items():
        field = key.partition(".")[0]
        if field in KEPT:
            continue
        if field != "tokens":
            raise UserError(
                f"model.{key}: {before} -> {after}: pruning takes away parameter tokens and "
                f"nothing else; set model.{key}={before}"
            )
        if after > before:
            raise UserError(
                f"model.{key}: {before} -> {after}: pruning never makes a model larger; set it to "
                f"at most {before}, or take `tokengrow grow`"
            )
    if requested.tokens == source.tokens:
        raise UserError(
            "model is the size that source has already: name a smaller one, for example "
            f"model.tokens.ffn={max(1, source.tokens.ffn // 2)}"
        )
    return replace(source, tokens=requested.tokens)


def prune(
    source: ModelConfig,
    target: ModelConfig,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    text: Tensor,
    probe: Tensor,
) -> Pruned:
    """Takes parameter tokens away, and measures what that did.

    Args:
        source: config before.
        target: of `plan_pruning`.
        weights: state dict of the source, on the CPU; not modified.
        optimizer: flat optimizer state of the source, or empty; not modified.
        text: [B, T + 1] int64 token ids on which tokens are ranked.
        probe: [B, T + 1] int64 token ids, others than `text`, on which the drift is measured.
    """
    activity = measure_activity(source, weights, text[:, :-1])
    kept = rank(activity, target)
    config = replace(target, tau=rescaled_tau(activity, kept, target))
    rows = row_indices(kept)
    smaller = kept_rows(weights, rows)
    before = TokenFormer.from_weights(source, weights, torch.float32)
    drift = pruning_drift(before, TokenFormer.from_weights(config, smaller, torch.float32), probe)
    report = {
        "operation": "prune",
        "steps": [{"axis": "tokens", "changes": source.differences(config)}],
        "text_tokens": text[:, :-1].numel(),
        "kept_contribution": kept_contribution(activity, kept),
        "drift": asdict(drift),
    }
    return Pruned(config, smaller, kept_moments(optimizer, rows, weights), report, kept)


def rank(activity: Mapping[Layer, Activity], target: ModelConfig) -> dict[Layer, Tensor]:
    """Indices of the tokens that stay in each layer, in their order, int64 [N of the target].

    Of equal contributions the earlier token stays.
    """
    kept = {}
    for (number, role), each in activity.items():
        order = each.contribution.argsort(descending=True, stable=True)
        kept[number, role] = order[: getattr(target.tokens, role)].sort().values
    return kept


def rescaled_tau(
    activity: Mapping[Layer, Activity], kept: Mapping[Layer, Tensor], config: ModelConfig
) -> Taus:
    """tau of each role after the pruning: see the head of this file."""
    taus = {}
    for role, tau in asdict(config.tau).items():
        lost = [_without(activity[layer].share, kept[layer]) for layer in kept if layer[1] == role]
        # Where what is kept scores nothing at all, no scale is right: tau stays.
        taus[role] = tau * (math.sqrt(max(0.0, 1 - sum(lost) / len(lost))) or 1.0)
    return Taus(**taus)


def _without(amounts: Tensor, kept: Tensor) -> float:
    """The sum of what is dropped: exactly 0 where that is nothing, or zeros."""
    dropped = torch.ones(len(amounts), dtype=torch.bool)
    dropped[kept] = False
    return amounts[dropped].sum().item()


def kept_contribution(
    activity: Mapping[Layer, Activity], kept: Mapping[Layer, Tensor]
) -> dict[str, float]:
    """The share of all contribution that stays, in each role that lost tokens."""
    shares = {}
    for role in ROLES:
        layers = [layer for layer in kept if layer[1] == role]
        if all(len(kept[layer]) == len(activity[layer].contribution) for layer in layers):
            continue
        whole = sum(activity[layer].contribution.sum().item() for layer in layers)
        lost = sum(_without(activity[layer].contribution, kept[layer]) for layer in layers)
        shares[role] = 1 - lost / whole if whole else 1.0
    return shares


def row_indices(kept: Mapping[Layer, Tensor]) -> dict[str, Tensor]:
    """Name of every parameter-token tensor, to the rows of it that stay."""
    return {
        pattention_name(number, role, part): rows
        for (number, role), rows in kept.items()
        for part in ("key", "value")
    }


def kept_rows(state: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> State:
    """Named tensors with these rows alone; those not named are shared with `state`."""
    return {name: t[rows[name]] if name in rows else t for name, t in state.items()}


def kept_moments(
    optimizer: Mapping[str, Tensor], rows: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> State:
    """The optimizer's state of the kept tokens: whatever a slot holds per row goes with the row.

    Args:
        optimizer: flat state, `{slot}.{parameter name}`; not modified.
        rows: of `row_indices`.
        weights: of the source.
    """
    smaller = dict(optimizer)
    for key, tensor in optimizer.items():
        slot, _, name = key.partition(".")
        if name in rows and slot != COLUMN_AGE and tensor.shape[:1] == weights[name].shape[:1]:
            smaller[key] = tensor[rows[name]]
    return smaller


def pruning_drift(source: TokenFormer, pruned: TokenFormer, probe: Tensor) -> Drift:
    """How far the logits have moved, one sequence at a time; `relative` is that of the worst.

    Args:
        source: on the CPU, in float32.
        pruned: likewise.
        probe: [B, T + 1] int64 token ids.
    """
    each = [measure_drift(source, pruned, sequence) for sequence in probe.split(1)]

    def mean(key: str) -> float:
        return sum(getattr(drift, key) for drift in each) / len(each)

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
