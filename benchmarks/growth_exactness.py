"""Drift of the logits by growth at the published sizes, per axis and over the full ladder.

    python -m benchmarks.growth_exactness                    all rows
    python -m benchmarks.growth_exactness 150m 450m width    one row

The weights are random, three times as large as at initialisation, so that the logits have a spread
of about 5. Weights and comparison are in float32; the input is 2 x 128 random tokens. Each row runs
in a separate process, so that its peak memory is measured separately. Prints CSV rows to stdout.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from tokengrow.bench.rows import print_rows
from tokengrow.checkpoint.tensors import StateDict
from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.engine import apply_growth
from tokengrow.growth.plan import AXES, plan_growth
from tokengrow.growth.verify import compare_logits, compute_logits
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import TokenFormer

LADDER = ("150m", "450m", "900m", "1.5b")
ALL = "all"


def random_weights(config: ModelConfig) -> StateDict:
    """Return the published initialisation, times three except for the final norm."""
    model = TokenFormer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        parameter.data.mul_(1.0 if name.startswith("final_norm") else 3.0)
    return model.to_weights()


def measure(first: str, last: str, axis: str) -> dict[str, Any]:
    """Grow one published size to another along one axis, or along all, through every rung."""
    rungs = [ModelConfig.preset(name) for name in LADDER[LADDER.index(first) :]]
    rungs = rungs[: LADDER.index(last) - LADDER.index(first) + 1]
    source, weights = rungs[0], random_weights(rungs[0])
    ids = torch.randint(source.vocab_size, (2, 129), generator=torch.Generator().manual_seed(0))
    before = compute_logits(source, weights, torch.float32, ids[:, :-1])
    began, config = time.perf_counter(), source
    for rung in rungs[1:]:
        names = [name for each in AXES if axis in (each, ALL) for name in AXES[each]]
        target = replace(config, **{name: getattr(rung, name) for name in names})
        plan = plan_growth(config, target, config=GrowthConfig(tolerance=float("inf")))
        if not plan.steps:
            return {}
        grown = apply_growth(plan, weights, {}, ids)
        config, weights = grown.config, grown.weights
    seconds = time.perf_counter() - began
    after = compute_logits(config, weights, torch.float32, ids[:, :-1])
    drift = compare_logits(before, after, ids[:, 1:])
    return {
        "from": first,
        "to": last,
        "axis": axis,
        "parameters_before": source.num_parameters(),
        "parameters_after": config.num_parameters(),
        "max_logit": f"{drift.max_logit:.1e}",
        "relative": f"{drift.relative:.1e}",
        "kl": f"{drift.kl:.1e}",
        "loss_before": f"{drift.loss_source:.6f}",
        "loss_after": f"{drift.loss_grown:.6f}",
        "seconds": round(seconds, 1),
        "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 1),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }


def rows() -> list[tuple[str, str, str]]:
    """Return (from, to, axis) of every row."""
    pairs = list(pairwise(LADDER))
    single_steps = [(first, last, axis) for first, last in pairs for axis in (*AXES, ALL)]
    return [*single_steps, (LADDER[0], LADDER[-1], ALL)]


def main() -> None:
    """Print one row, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("row", nargs="*", metavar="FROM TO AXIS")
    chosen = parser.parse_args().row
    if chosen:
        print(json.dumps(measure(*chosen)))
        return
    # A row is empty if the two sizes do not differ on the axis.
    print_rows(filter(None, (measure_in_subprocess(row) for row in rows())))


def measure_in_subprocess(row: tuple[str, str, str]) -> dict[str, Any]:
    """Measure one row in a separate process, so that its peak memory is measured separately."""
    command = [sys.executable, "-m", "benchmarks.growth_exactness", *row]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


if __name__ == "__main__":
    main()
