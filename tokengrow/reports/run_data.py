"""What a report knows of a run: read from its newest checkpoint, its markers and its sessions.

A run is read as plain values, so that one of an older version, or of another architecture, is read
too. No tensor is.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokengrow.checkpoint.layout import (
    COMPLETE,
    RUN_CONFIG,
    SESSIONS,
    WEIGHTS,
    find_checkpoints,
    recorded_sha256,
    step_of,
)
from tokengrow.checkpoint.schema import LineageEntry, Rung, SourceCost, Validation, WallTimes
from tokengrow.checkpoint.store import Checkpoint, load_checkpoint
from tokengrow.errors import UserError
from tokengrow.evaluation.results import read_results, results_files

Values = Mapping[str, Any]

ASSIGNMENT = re.compile(r"([^=,]+)=(.*?)(?=,[^=,]+=|$)")
"""A key and its value in the name of a job; a value may hold commas."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What lies behind the checkpoint that a run started from; None: not recorded."""

    tokens: int | None = 0
    """Trained on."""
    flops: float | None = 0.0
    """As `flops_per_token` counts."""
    seconds: float | None = 0.0
    """Wall time."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A validation. Costs are cumulative: with what lies behind the run's source, where known."""

    step: int
    """Optimizer updates of the run."""
    rung: int
    """Index of its rung."""
    tokens: int
    """Trained on."""
    flops: float
    """Spent."""
    seconds: float | None
    """Wall time; None: not recorded."""
    loss: float
    """Nats per token."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run, as far as its newest checkpoint."""

    name: str
    """By which the report calls it."""
    folder: Path
    """Of the run."""
    step: int
    """Of the checkpoint up to which it is shown."""
    stands: str
    """Finished, or where it stands."""
    before: Spent
    """Behind its source."""
    rungs: tuple[Rung, ...]
    """Smallest first."""
    points: tuple[Point, ...]
    """Its validations."""
    tokens: int
    """Trained on, in all stages of the run."""
    flops: float
    """Spent, likewise."""
    seconds: float | None
    """Wall time of the run up to its newest checkpoint; None: not recorded."""
    config: Values
    """The resolved recipe."""
    lineage: tuple[LineageEntry, ...]
    """Growths and prunings behind its newest checkpoint, oldest first."""
    source: SourceCost | None
    """What the run noted of the checkpoint that it started from."""
    weights: Mapping[str, int]
    """SHA-256 of the weights of each whole checkpoint on the disk, to its step."""
    sessions: tuple[Values, ...]
    """Where it ran; empty: not recorded."""
    evaluations: tuple[Values, ...]
    """What `tokengrow eval` found of its checkpoints, up to the newest one that is shown."""
    fingerprint: str
    """Of its tokens."""

    @property
    def total_flops(self) -> float:
        """With what lies behind its source, where that is known."""
        return self.flops + (self.before.flops or 0.0)

    @property
    def total_tokens(self) -> int:
        """Likewise."""
        return self.tokens + (self.before.tokens or 0)

    @property
    def total_seconds(self) -> float | None:
        """Likewise; None where the run's own are not known."""
        return None if self.seconds is None else self.seconds + (self.before.seconds or 0.0)

    @property
    def lowest(self) -> Point:
        """The validation with the lowest loss, the first of equals."""
        return min(self.points, key=lambda point: point.loss)

    @property
    def own_growths(self) -> int:
        """How many of the lineage's last entries are growths of this run."""
        return sum(rung.drift is not None for rung in self.rungs)

    @property
    def validated_on(self) -> tuple[Any, ...]:
        """What two runs share whose validation losses can be compared."""
        stages = self.config.get("stages", {})
        contexts = {stage["model"]["context_length"] for stage in stages.values()}
        return self.fingerprint, self.config.get("validation_sequences"), *sorted(contexts)


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A run, or the results of an evaluation, that the report says nothing of."""

    path: Path
    """Its folder, or their file."""
    reason: str
    """Why."""


def read_runs(paths: Sequence[Path]) -> tuple[list[RunRecord], list[LeftOut]]:
    """Reads runs; what has no checkpoint yet is left out, and said.

    Args:
        paths: of runs, of checkpoints, or of folders of runs, as a sweep's is.

    Raises:
        UserError: a path that is none of these, or no run that has a checkpoint.
    """
    read: list[Checkpoint] = []
    left_out = []
    seen = set()
    for folder in (run for path in paths for run in _runs_of(path)):
        if folder.resolve() in seen:
            left_out.append(LeftOut(path=folder, reason="named twice, shown once"))
            continue
        seen.add(folder.resolve())
        try:
            checkpoint = load_checkpoint(folder, tensors=False)
        except UserError as error:
            reason = str(error) if find_checkpoints(folder) else "no whole checkpoint yet"
            left_out.append(LeftOut(path=folder, reason=reason))
            continue
        if checkpoint.train_state and checkpoint.train_state.validation:
            read.append(checkpoint)
        else:
            reason = "its checkpoint was written by no run: nothing was trained there"
            left_out.append(LeftOut(path=folder, reason=reason))
    if not read:
        told = "; ".join(f"{each.path}: {each.reason}" for each in left_out)
        raise UserError(f"runs has nothing to report on ({told}): give runs that have a checkpoint")
    records = []
    for checkpoint, name in zip(read, _names(read), strict=True):
        weights = _weights(_run_folder(checkpoint))
        evaluations, unread = _evaluations(checkpoint, weights)
        records.append(_record(checkpoint, name, weights, evaluations))
        left_out += unread
    return records, list(dict.fromkeys(left_out))


def _names(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Those of their runs; of several of one run, each with its step."""
    names = run_names([_run_folder(each) for each in checkpoints])
    return [
        f"{name}, step {each.step}" if names.count(name) > 1 else name
        for name, each in zip(names, checkpoints, strict=True)
    ]


def run_names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with those of their parents where the bare names are not unique; of jobs
    of a sweep, what tells them apart."""
    depth = 1
    parts = [folder.resolve().parts for folder in folders]
    while len({each[-depth:] for each in parts}) < len(set(parts)):
        depth += 1
    told = short_run_names([each[-1] for each in parts])
    return ["/".join((*each[-depth:-1], name)) for each, name in zip(parts, told, strict=True)]


def short_run_names(names: Sequence[str]) -> list[str]:
    """Names of jobs without what they share: `arm=grown` and `arm=small` are `grown` and `small`;
    `optim.lr=1,model.layers=2` is `lr=1,layers=2` where lr and layers mean one key each. Names that
    are not all made of KEY=VALUE, and those of one job, stay as they are."""
    jobs = [dict(ASSIGNMENT.findall(name)) for name in names]
    made = [",".join(f"{key}={value}" for key, value in job.items()) for job in jobs]
    if made != list(names) or len(set(names)) == 1:
        return list(names)
    keys = list(dict.fromkeys(key for job in jobs for key in job))
    differing = [key for key in keys if len({job.get(key) for job in jobs}) > 1]
    if len(differing) == 1 and all(differing[0] in job for job in jobs):
        return [job[differing[0]] for job in jobs]
    last = [key.rpartition(".")[2] for key in differing]
    short = {
        key: name if last.count(name) == 1 else key
        for key, name in zip(differing, last, strict=True)
    }
    return [
        ",".join(f"{short[key]}={value}" for key, value in job.items() if key in short) or name
        for job, name in zip(jobs, names, strict=True)
    ]


def _runs_of(path: Path) -> list[Path]:
    """The run of a path, or all runs that lie in it."""
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise UserError(f"runs names {path}, which {what}: give folders of runs")
    if _is_run(path) or (path / COMPLETE).is_file():
        return [path]
    inside = sorted(each for each in path.iterdir() if each.is_dir() and _is_run(each))
    if not inside:
        raise UserError(
            f"runs names {path}, which is no run and holds none: give folders of runs, or one that "
            "holds them"
        )
    return inside


def _is_run(folder: Path) -> bool:
    return (folder / RUN_CONFIG).is_file() or bool(find_checkpoints(folder))


def _run_folder(checkpoint: Checkpoint) -> Path:
    assert checkpoint.folder is not None
    return checkpoint.folder.resolve().parent


def _record(
    checkpoint: Checkpoint,
    name: str,
    weights: Mapping[str, int],
    evaluations: Iterable[Values],
) -> RunRecord:
    state, run, folder = checkpoint.train_state, checkpoint.run, _run_folder(checkpoint)
    assert state is not None and run is not None
    before, times = _spent_before(checkpoint), checkpoint.times
    return RunRecord(
        name=name,
        folder=folder,
        step=checkpoint.step,
        stands=_stands(checkpoint),
        before=before,
        rungs=tuple(state.rungs),
        points=tuple(_points(state.validation, times, before)),
        tokens=state.tokens,
        flops=state.flops,
        seconds=times.seconds if times else None,
        config=run.to_dict(),
        lineage=checkpoint.lineage,
        source=state.source,
        weights=weights,
        sessions=_sessions(folder),
        evaluations=tuple(evaluations),
        fingerprint=state.fingerprint,
    )


def _evaluations(
    checkpoint: Checkpoint, weights: Mapping[str, int]
) -> tuple[list[Values], list[LeftOut]]:
    """The results that lie in a run, of checkpoints up to one of them.

    Args:
        checkpoint: that one.
        weights: of the run, as `_weights` reads them.
    """
    read: list[Values] = []
    left_out = []
    for path in results_files(_run_folder(checkpoint)):
        try:
            results = read_results(path)
        except UserError:
            reason = "damaged, or no results of tokengrow eval: delete it, and evaluate again"
            left_out.append(LeftOut(path=path, reason=reason))
            continue
        evaluated = results["checkpoint"]
        step = evaluated["step"]
        if step in weights.values() and weights.get(evaluated["weights_sha256"]) != step:
            reason = f"of other weights than those that step {step} has now: evaluate again"
            left_out.append(LeftOut(path=path, reason=reason))
        elif step <= checkpoint.step:
            read.append(results)
    return read, left_out


def _weights(run: Path) -> dict[str, int]:
    """Hash of the weights of each checkpoint of a run to its step."""
    found = {}
    for folder in find_checkpoints(run):
        with suppress(UserError, OSError):  # damaged, or deleted since by the run that goes on
            found[recorded_sha256(folder, WEIGHTS)] = step_of(folder)
    return found


def _spent_before(checkpoint: Checkpoint) -> Spent:
    run, state, times = checkpoint.run, checkpoint.train_state, checkpoint.times
    if run is None or not run.source:
        return Spent()
    source = state.source if state else None
    return Spent(
        tokens=source.tokens if source else None,
        flops=source.flops if source else None,
        seconds=times.before if times else None,
    )


def _points(
    validations: Sequence[Validation], times: WallTimes | None, before: Spent
) -> Iterable[Point]:
    unknown = (None,) * len(validations)
    seconds = unknown if times is None or times.validation is None else times.validation
    for row, second in zip(validations, seconds, strict=True):
        yield Point(
            step=row.step,
            rung=row.stage,
            tokens=row.tokens + (before.tokens or 0),
            flops=row.flops + (before.flops or 0.0),
            seconds=None if second is None else second + (before.seconds or 0.0),
            loss=row.loss,
        )


def _stands(checkpoint: Checkpoint) -> str:
    """Finished, or how far its newest checkpoint is."""
    state, run = checkpoint.train_state, checkpoint.run
    assert state is not None and run is not None
    stages, name = run.stages, state.rung.name
    if len(state.stage_ends) >= len(stages):
        return "finished"
    if state.stage_ended:
        return f"unfinished: after stage {name}, {len(state.rungs)} of {len(stages)}"
    steps = stages[name].steps if name in stages else "?"
    return f"unfinished: stage {name}, step {state.stage_step}/{steps}"


def _sessions(folder: Path) -> tuple[Values, ...]:
    path = folder / SESSIONS
    return tuple(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else ()
