"""Drift of a trained model by pruning: per ranking of the tokens, rule for tau, and share pruned.

    python -m benchmarks.prune SOURCE STORE                  a checkpoint or run, and a token store
    python -m benchmarks.prune SOURCE STORE --sequences 64

Tokens are ranked on `--sequences` training sequences. KL divergence and losses are means over as
many validation sequences. Both are evenly spaced over their split.

Rankings:
    contribution    that of `tokengrow prune`
    norms           norm of the key times norm of the value
    scores          share in the sum of squares times squared norm of the value; equal to the
                    contribution if there were no GELU
    random          mean over three seeds

Rules for tau:
    kept            unchanged
    mean-share      that of `tokengrow prune`
    mean-norm       times the mean of ‖s kept‖ / ‖s‖ over positions and layers; only l2_norm_gelu

Prints CSV rows to stdout.
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
from tokengrow.model.config import ROLES, ModelConfig, ParameterTokens, Taus
from tokengrow.model.tokenformer import TokenFormer, pattention_layers

SHARES = (0.1, 0.25, 0.5)
"""Shares of the tokens to prune."""

PARTS = {
    "query, key": ROLES[:2],
    "value": ROLES[2:3],
    "output": ROLES[3:4],
    "ffn": ROLES[4:],
    "attention": ROLES[:4],
    "all": ROLES,
}
"""Name in a row to the roles whose tokens are pruned."""

SEEDS = (0, 1, 2)


def replace_ranking(
    source: Checkpoint, activity: Mapping[Layer, Activity], ranking: str, seed: int
) -> dict[Layer, Activity]:
    """Replace the contribution, by which tokens are ranked, by another ranking."""
    generator = torch.Generator().manual_seed(seed)
    ranked: dict[Layer, Activity] = {}
    for (number, role), measured in activity.items():
        key, value = (
            source.weights[pattention_name(number, role, part)].norm(dim=1)
            for part in ("key", "value")
        )
        rankings = {
            "contribution": measured.contribution,
            "norms": key * value,
            "scores": measured.share * value**2,
            "random": torch.rand(len(key), generator=generator),
        }
        ranked[number, role] = replace(measured, contribution=rankings[ranking])
    return ranked


@torch.inference_mode()
def mean_norm_tau(
    model: TokenFormer, ids: Tensor, kept: Mapping[Layer, Tensor], config: ModelConfig
) -> Taus:
    """Return tau times the mean of ‖s kept‖ / ‖s‖ over positions and layers."""
    ratios: dict[str, list[Tensor]] = {role: [] for role in ROLES}
    hooks = []
    for number, block in enumerate(model.blocks):
        for role, layer in pattention_layers(block):

            def add_ratio(
                layer: Any, inputs: Any, _: Any, role: str = role, number: int = number
            ) -> None:
                scores = F.linear(inputs[0], layer.key_param_tokens)  # [1, T, N]
                ratio = scores[..., kept[number, role]].norm(dim=-1) / scores.norm(dim=-1)
                ratios[role].append(ratio.mean())

            hooks.append(layer.register_forward_hook(add_ratio))
    for sequence in ids.split(1):
        model(sequence)
    for hook in hooks:
        hook.remove()
    mean = {role: torch.stack(values).mean().item() for role, values in ratios.items()}
    return Taus(**{role: tau * mean[role] for role, tau in asdict(config.tau).items()})


def measure_drifts(
    source: Checkpoint, text: Tensor, probe: Tensor
) -> Iterator[tuple[str, float, str, str, ModelConfig, list[Drift]]]:
    """Yield (roles, share, ranking, rule for tau, config, drift per seed) of every pruning."""
    model = TokenFormer.from_weights(source.config, source.weights, torch.float32)
    activity = measure_activity(source.config, source.weights, text[:, :-1])
    for part, roles in PARTS.items():
        for share in SHARES:
            sizes = asdict(source.config.tokens)
            sizes |= {role: round(sizes[role] * (1 - share)) for role in roles}
            target = replace(source.config, tokens=ParameterTokens(**sizes))
            for ranking in ("contribution", "norms", "scores", "random"):
                drifts: dict[str, list[Drift]] = {}
                for seed in SEEDS if ranking == "random" else SEEDS[:1]:
                    kept = select_tokens(replace_ranking(source, activity, ranking, seed), target)
                    taus = {"kept": target.tau, "mean-share": rescaled_tau(activity, kept, target)}
                    if ranking == "contribution" and target.activation == "l2_norm_gelu":
                        taus["mean-norm"] = mean_norm_tau(model, text[:, :-1], kept, target)
                    weights = select_rows(source.weights, rows_by_name(kept))
                    for rule, tau in taus.items():
                        config = replace(target, tau=tau)
                        smaller = TokenFormer.from_weights(config, weights, torch.float32)
                        drift = pruning_drift(model, smaller, probe)
                        drifts.setdefault(rule, []).append(drift)
                for rule, by_seed in drifts.items():
                    yield part, share, ranking, rule, target, by_seed


def main() -> None:
    """Print one row per pruning."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("store", type=Path)
    parser.add_argument("--sequences", type=int, default=32)
    args = parser.parse_args()
    source, store = load_checkpoint(args.source), TokenStore.open(args.store)
    length = source.config.context_length
    text, probe = (
        evenly_spaced_batch(store.sequences(split, length), args.sequences)
        for split in ("train", "validation")
    )
    print_rows(pruning_row(*pruning) for pruning in measure_drifts(source, text, probe))


def pruning_row(
    part: str, share: float, ranking: str, tau: str, config: ModelConfig, drifts: list[Drift]
) -> dict[str, Any]:
    """Return the row of one pruning; values are means over its seeds."""

    def mean(key: str) -> float:
        return sum(getattr(drift, key) for drift in drifts) / len(drifts)

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
