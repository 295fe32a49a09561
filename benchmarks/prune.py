"""How far pruning moves a trained model: by what is ranked, by what becomes of tau, by how much.

    python -m benchmarks.prune SOURCE STORE                  a checkpoint or run, and a token store
    python -m benchmarks.prune SOURCE STORE --sequences 64

Tokens are ranked on that many training sequences; KL divergence and losses are of as many
validation sequences, both spread evenly over their split. Rankings: contribution (that of
`tokengrow prune`), norms (length of the key times length of the value), scores (share in the sum of
squares times squared length of the value: the contribution, were there no GELU), random (the mean
over three seeds). tau: kept; mean-share (that of `tokengrow prune`); mean-norm (times the mean of
‖s kept‖ / ‖s‖ over positions and layers; for l2_norm_gelu alone). One CSV row each on stdout.
"""

import argparse
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokengrow.bench.rows import print_rows
from tokengrow.checkpoint.schema import Drift
from tokengrow.checkpoint.store import Checkpoint, load_checkpoint
from tokengrow.data.loader import evenly_spaced_batch
from tokengrow.data.store import TokenStore
from tokengrow.growth.prune import (
    pruning_drift,
    rescaled_tau,
    rows_by_name,
    select_rows,
    select_tokens,
)
from tokengrow.growth.tensors import pattention_name
from tokengrow.model.activity import Activity, Layer, measure_activity
from tokengrow.model.config import ROLES, ModelConfig, Taus, Tokens
from tokengrow.model.tokenformer import TokenFormer, pattention_layers

SHARES = (0.1, 0.25, 0.5)
"""Of the tokens, taken away."""

PARTS = {
    "query, key": ROLES[:2],
    "value": ROLES[2:3],
    "output": ROLES[3:4],
    "ffn": ROLES[4:],
    "attention": ROLES[:4],
    "all": ROLES,
}
"""Which roles lose them."""

SEEDS = (0, 1, 2)


def ranked_by(
    source: Checkpoint, activity: Mapping[Layer, Activity], ranking: str, seed: int
) -> dict[Layer, Activity]:
    """The activity with another number in place of the contribution, by which tokens are ranked."""
    generator = torch.Generator().manual_seed(seed)
    ranked: dict[Layer, Activity] = {}
    for (number, role), each in activity.items():
        key, value = (
            source.weights[pattention_name(number, role, part)].norm(dim=1)
            for part in ("key", "value")
        )
        by = {
            "contribution": each.contribution,
            "norms": key * value,
            "scores": each.share * value**2,
            "random": torch.rand(len(key), generator=generator),
        }
        ranked[number, role] = replace(each, contribution=by[ranking])
    return ranked


@torch.inference_mode()
def mean_norm_tau(
    model: TokenFormer, ids: Tensor, kept: Mapping[Layer, Tensor], config: ModelConfig
) -> Taus:
    """tau times the mean of ‖s kept‖ / ‖s‖ over positions and layers."""
    ratios: dict[str, list[Tensor]] = {role: [] for role in ROLES}
    hooks = []
    for number, block in enumerate(model.blocks):
        for role, layer in pattention_layers(block):

            def add(
                layer: Any, inputs: Any, _: Any, role: str = role, number: int = number
            ) -> None:
                found = F.linear(inputs[0], layer.key_param_tokens)  # [1, T, N]
                left = found[..., kept[number, role]].norm(dim=-1) / found.norm(dim=-1)
                ratios[role].append(left.mean())

            hooks.append(layer.register_forward_hook(add))
    for sequence in ids.split(1):
        model(sequence)
    for hook in hooks:
        hook.remove()
    mean = {role: torch.stack(found).mean().item() for role, found in ratios.items()}
    return Taus(**{role: tau * mean[role] for role, tau in asdict(config.tau).items()})


def drifts(
    source: Checkpoint, text: Tensor, probe: Tensor
) -> Iterator[tuple[str, float, str, str, ModelConfig, list[Drift]]]:
    """(roles, share, ranking, tau, config, drift of each seed) of every pruning."""
    model = TokenFormer.from_weights(source.config, source.weights, torch.float32)
    activity = measure_activity(source.config, source.weights, text[:, :-1])
    for part, roles in PARTS.items():
        for share in SHARES:
            sizes = asdict(source.config.tokens)
            sizes |= {role: round(sizes[role] * (1 - share)) for role in roles}
            target = replace(source.config, tokens=Tokens(**sizes))
            for ranking in ("contribution", "norms", "scores", "random"):
                found: dict[str, list[Drift]] = {}
                for seed in SEEDS if ranking == "random" else SEEDS[:1]:
                    kept = select_tokens(ranked_by(source, activity, ranking, seed), target)
                    taus = {"kept": target.tau, "mean-share": rescaled_tau(activity, kept, target)}
                    if ranking == "contribution" and target.activation == "l2_norm_gelu":
                        taus["mean-norm"] = mean_norm_tau(model, text[:, :-1], kept, target)
                    weights = select_rows(source.weights, rows_by_name(kept))
                    for how, tau in taus.items():
                        config = replace(target, tau=tau)
                        smaller = TokenFormer.from_weights(config, weights, torch.float32)
                        found.setdefault(how, []).append(pruning_drift(model, smaller, probe))
                for how, each in found.items():
                    yield part, share, ranking, how, target, each


def main() -> None:
    """Prints one row per pruning."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("store", type=Path)
    parser.add_argument("--sequences", type=int, default=32)
    given = parser.parse_args()
    source, store = load_checkpoint(given.source), TokenStore.open(given.store)
    length = source.config.context_length
    text, probe = (
        evenly_spaced_batch(store.sequences(split, length), given.sequences)
        for split in ("train", "validation")
    )
    print_rows(row_of(*measured) for measured in drifts(source, text, probe))


def row_of(
    part: str, share: float, ranking: str, tau: str, config: ModelConfig, each: list[Drift]
) -> dict[str, Any]:
    """One pruning; figures are means over its seeds."""

    def mean(key: str) -> float:
        return sum(getattr(drift, key) for drift in each) / len(each)

    return {
        "roles": part,
        "dropped": share,
        "ranking": ranking,
        "tau": tau,
        "parameters": config.num_parameters(),
        "kl": f"{mean('kl'):.4f}",
        "loss_before": f"{mean('loss_source'):.4f}",
        "loss_after": f"{mean('loss_grown'):.4f}",
        "max_logit": f"{mean('max_logit'):.2f}",
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }


if __name__ == "__main__":
    main()
