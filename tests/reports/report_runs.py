"""Tiny runs and run records for tests of reports."""

from collections.abc import Callable
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

from tokengrow.checkpoint.schema import Rung
from tokengrow.checkpoint.store import Checkpoint, save_checkpoint
from tokengrow.data.loader import evenly_spaced_batch
from tokengrow.data.store import TokenStore
from tokengrow.growth.checkpoint import grow_checkpoint, prune_checkpoint
from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.plan import plan_growth
from tokengrow.growth.prune import plan_pruning
from tokengrow.reports.run_data import LossPoint, PriorCost, RunRecord
from tokengrow.training.config import TrainConfig
from tokengrow.training.trainer import fit

PUBLISHED = GrowthConfig(init="published", optimizer="fresh", tolerance=inf)

NAMES = ("small", "grown", "scratch", "on", "published", "after")
"""Names of the runs that `train_runs` trains."""


def train_runs(folder: Path, tiny_run: Callable[..., TrainConfig], store: TokenStore) -> None:
    """Train six runs into a directory.

    - `small`: the small size.
    - `grown`: a ladder whose first stage equals `small`.
    - `scratch`: the large size from initial weights.
    - `on`: continues the training of `small`.
    - `published`: a ladder whose growth changes the loss.
    - `after`: starts from a checkpoint that was grown from `small` and pruned outside of any run.
    """

    def train(name: str, **changes: Any) -> Checkpoint:
        return fit(tiny_run(folder / name, **{"steps": 4, **changes}), store).checkpoint

    small = train("small", rungs=(8,))
    train("grown", rungs=(8, 12))
    train("scratch", rungs=(12,), steps=6, seed=1)
    train("on", rungs=(8,), source=str(folder / "small"))
    train("published", rungs=(8, 12), growth=PUBLISHED)
    larger = tiny_run(folder, rungs=(8, 12)).stages[1].model
    grown = grow_checkpoint(small, plan_growth(small.config, larger))
    target = plan_pruning(larger, replace(larger, tokens=replace(larger.tokens, ffn=20)))
    text, probe = (
        evenly_spaced_batch(store.sequences(split, larger.context_length), 2)
        for split in ("train", "validation")
    )
    pruned = prune_checkpoint(grown, target, text, probe)
    save_checkpoint(folder / "pruned" / "step_00000004", pruned)
    (stage,) = tiny_run(folder, rungs=(12,)).stages
    stage = replace(stage, steps=4, model=replace(stage.model, tokens=target.tokens))
    train("after", stages=(stage,), source=str(folder / "pruned"))


def make_record(name: str, *points: tuple[float, float], **changes: Any) -> RunRecord:
    """Return a run of one rung with the given (FLOPs, loss) points."""
    rung = Rung(
        name="only", parameters=1000, tokens=100, flops=points[-1][0], loss_before=None,
        loss_start=points[0][1], loss_end=points[-1][1], drift=None, ends_at=len(points),
    )  # fmt: skip
    values: dict[str, Any] = {
        "name": name,
        "folder": Path(name),
        "step": len(points) - 1,
        "status": "finished",
        "prior_cost": PriorCost(),
        "rungs": (rung,),
        "points": tuple(
            LossPoint(step=n, rung=0, tokens=n, flops=flops, seconds=float(n), loss=loss)
            for n, (flops, loss) in enumerate(points)
        ),
        "tokens": 100,
        "flops": points[-1][0],
        "seconds": float(len(points)),
        "config": {"seed": 0, "stages": {}},
        "lineage": (),
        "source": None,
        "weights": {},
        "sessions": (),
        "evaluations": (),
        "fingerprint": "these tokens",
    }
    return RunRecord(**{**values, **changes})
