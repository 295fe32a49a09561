"""Tiny runs beside each other, as a study has them."""

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
from tokengrow.reports.run_data import Point, RunRecord, Spent
from tokengrow.training.config import TrainConfig
from tokengrow.training.trainer import fit

PUBLISHED = GrowthConfig(init="published", optimizer="fresh", tolerance=inf)


def make_arms(folder: Path, tiny_run: Callable[..., TrainConfig], store: TokenStore) -> None:
    """Trains six runs into a folder.

    small; grown, a ladder that begins as small; scratch, of the large size; on, which trains small
    on; published, whose growth has a jump; and after, which goes on from what was grown from small
    and pruned again, outside of any run.
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


def record(name: str, *points: tuple[float, float], **changes: Any) -> RunRecord:
    """A run of one rung with these validations: (FLOPs, loss)."""
    rung = Rung(
        name="only", parameters=1000, tokens=100, flops=points[-1][0], loss_before=None,
        loss_start=points[0][1], loss_end=points[-1][1], drift=None, ends_at=len(points),
    )  # fmt: skip
    values: dict[str, Any] = {
        "name": name,
        "folder": Path(name),
        "step": len(points) - 1,
        "stands": "finished",
        "before": Spent(),
        "rungs": (rung,),
        "points": tuple(
            Point(step=n, rung=0, tokens=n, flops=flops, seconds=float(n), loss=loss)
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
        "fingerprint": "of these tokens",
    }
    return RunRecord(**{**values, **changes})
