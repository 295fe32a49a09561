"""Data of runs for a report, read from their newest checkpoints, markers and session files.

Only metadata is read, never tensors.
"""

import json
from collections.abc import Mapping, Sequence
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
from tokengrow.checkpoint.schema import LineageEntry, RecordedRun, Rung, SourceCost, TrainState
from tokengrow.checkpoint.store import Checkpoint, load_checkpoint
from tokengrow.console.format import first_line
from tokengrow.errors import UserError
from tokengrow.evaluation.results import read_results, results_files
from tokengrow.reports.run_names import run_names

JSONObject = Mapping[str, Any]
"""Content of a JSON file or of a recipe."""


@dataclass(frozen=True, kw_only=True)
class PriorCost:
    """Cost of a run's source checkpoint, with its own sources; None: not recorded."""

    tokens: int | None = 0
    """Tokens trained on."""
    flops: float | None = 0.0
    """FLOPs, as `flops_per_token` counts them."""
    seconds: float | None = 0.0
    """Wall time, seconds."""


@dataclass(frozen=True, kw_only=True)
class LossPoint:
    """Validation loss with its cumulative cost, which includes the recorded cost of the source."""

    step: int
    """Optimizer updates of the run."""
    rung: int
    """Index of the rung."""
    tokens: int
    """Tokens trained on."""
    flops: float
    """FLOPs spent."""
    seconds: float | None
    """Wall time, seconds; None: not recorded."""
    loss: float
    """Validation loss, nats per token."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Data of a run up to one of its checkpoints, by default its newest."""

    name: str
    """Name of the run in the report."""
    folder: Path
    """Directory of the run."""
    step: int
    """Step of the last checkpoint shown."""
    status: str
    """`finished`, or `unfinished` with the stage and step reached."""
    prior_cost: PriorCost
    """Cost of the source of the run."""
    rungs: tuple[Rung, ...]
    """Trained sizes, smallest first."""
    points: tuple[LossPoint, ...]
    """Validations, oldest first."""
    tokens: int
    """Tokens trained on in all stages of the run."""
    flops: float
    """FLOPs spent in all stages of the run."""
    seconds: float | None
    """Wall time of the run up to its checkpoint, seconds; None: not recorded."""
    config: JSONObject
    """Resolved recipe."""
    lineage: tuple[LineageEntry, ...]
    """Growths and prunings that led to the checkpoint, oldest first."""
    source: SourceCost | None
    """Source checkpoint that the run recorded; None: none, or not recorded."""
    weights: Mapping[str, int]
    """SHA-256 of the weights of each complete checkpoint on disk, mapped to its step."""
    sessions: tuple[JSONObject, ...]
    """Sessions of the run; empty: not recorded."""
    evaluations: tuple[JSONObject, ...]
    """Results of `tokengrow eval` for the checkpoints shown."""
    fingerprint: str
    """Fingerprint of the token store."""

    @property
    def total_flops(self) -> float:
        """FLOPs of the run and, if recorded, of its source."""
        return self.flops + (self.prior_cost.flops or 0.0)

    @property
    def total_tokens(self) -> int:
        """Tokens of the run and, if recorded, of its source."""
        return self.tokens + (self.prior_cost.tokens or 0)

    @property
    def total_seconds(self) -> float | None:
        """Wall time of the run and, if recorded, of its source; None: not recorded."""
        return None if self.seconds is None else self.seconds + (self.prior_cost.seconds or 0.0)

    @property
    def best_point(self) -> LossPoint:
        """First validation with the lowest loss."""
        return min(self.points, key=lambda point: point.loss)

    @property
    def own_growths(self) -> int:
        """Number of growths of this run, which are the last entries of its lineage."""
        return sum(rung.drift is not None for rung in self.rungs)

    @property
    def validation_key(self) -> tuple[Any, ...]:
        """Settings that two runs must share so that their validation losses are comparable."""
        stages = self.config.get("stages", {})
        contexts = {stage["model"]["context_length"] for stage in stages.values()}
        return self.fingerprint, self.config.get("validation_sequences"), *sorted(contexts)


@dataclass(frozen=True, kw_only=True)
class SkippedPath:
    """Run or results file that the report does not include."""

    path: Path
    """Directory of the run, or results file."""
    reason: str
    """Reason for skipping it."""


def read_runs(paths: Sequence[Path]) -> tuple[list[RunRecord], list[SkippedPath]]:
    """Read runs, and skip those that have no readable checkpoint.

    Args:
        paths: directories of runs or checkpoints, or directories that hold runs, such as a sweep.

    Returns:
        The runs in the order of `paths`, and the skipped runs and results files.

    Raises:
        UserError: a path is not one of these, or no run has a checkpoint.
    """
    checkpoints: list[Checkpoint] = []
    skipped = []
    seen = set()
    for folder in (run for path in paths for run in _expand_path(path)):
        if folder.resolve() in seen:
            skipped.append(SkippedPath(path=folder, reason="given twice, shown once"))
            continue
        seen.add(folder.resolve())
        try:
            checkpoint = load_checkpoint(folder, tensors=False)
        except UserError as error:
            has_checkpoint = bool(find_checkpoints(folder))
            reason = first_line(error) if has_checkpoint else "no complete checkpoint yet"
            skipped.append(SkippedPath(path=folder, reason=reason))
            continue
        if checkpoint.train_state and checkpoint.train_state.validation:
            checkpoints.append(checkpoint)
        else:
            reason = "its checkpoint was not written by a training run"
            skipped.append(SkippedPath(path=folder, reason=reason))
    if not checkpoints:
        reasons = "; ".join(f"{each.path}: {each.reason}" for each in skipped)
        raise UserError(
            f"runs must contain a run with a checkpoint, got none ({reasons}). Give other runs."
        )
    names = run_names([_run_folder(each) for each in checkpoints])
    records = []
    for checkpoint, name in zip(checkpoints, names, strict=True):
        unique_name = f"{name}, step {checkpoint.step}" if names.count(name) > 1 else name
        record, skipped_results = _read_record(checkpoint, unique_name)
        records.append(record)
        skipped += skipped_results
    return records, list(dict.fromkeys(skipped))


def _expand_path(path: Path) -> list[Path]:
    """Return a run or checkpoint directory, or all runs in a directory."""
    if not path.is_dir():
        problem = "is a file" if path.exists() else "does not exist"
        raise UserError(
            f"runs must be directories, got {path}, which {problem}. Give directories of runs."
        )
    if _is_run(path) or (path / COMPLETE).is_file():
        return [path]
    inside = sorted(each for each in path.iterdir() if each.is_dir() and _is_run(each))
    if not inside:
        raise UserError(
            f"runs must be directories of runs, got {path}, which holds no run. Give directories "
            "of runs, or a directory that holds them."
        )
    return inside


def _is_run(folder: Path) -> bool:
    return (folder / RUN_CONFIG).is_file() or bool(find_checkpoints(folder))


def _run_folder(checkpoint: Checkpoint) -> Path:
    assert checkpoint.folder is not None
    return checkpoint.folder.resolve().parent


def _read_record(checkpoint: Checkpoint, name: str) -> tuple[RunRecord, list[SkippedPath]]:
    """Return the data of a run up to a checkpoint, and its skipped results files."""
    state, run, times = checkpoint.train_state, checkpoint.run, checkpoint.times
    assert state is not None and run is not None
    folder = _run_folder(checkpoint)
    weights = {}
    for each in find_checkpoints(folder):
        with suppress(UserError, OSError):  # damaged, or deleted by the run, which may still train
            weights[recorded_sha256(each, WEIGHTS)] = step_of(each)
    prior_cost = PriorCost()
    if run.source:
        prior_cost = PriorCost(
            tokens=state.source.tokens if state.source else None,
            flops=state.source.flops if state.source else None,
            seconds=times.before if times else None,
        )
    validation_times = times.validation if times else None
    evaluations, skipped = _read_evaluations(folder, checkpoint.step, weights)
    sessions = folder / SESSIONS
    record = RunRecord(
        name=name,
        folder=folder,
        step=checkpoint.step,
        status=_run_status(state, run),
        prior_cost=prior_cost,
        rungs=tuple(state.rungs),
        points=_loss_points(state, validation_times, prior_cost),
        tokens=state.tokens,
        flops=state.flops,
        seconds=times.seconds if times else None,
        config=run.to_dict(),
        lineage=checkpoint.lineage,
        source=state.source,
        weights=weights,
        sessions=tuple(json.loads(sessions.read_text("utf-8"))) if sessions.is_file() else (),
        evaluations=tuple(evaluations),
        fingerprint=state.fingerprint,
    )
    return record, skipped


def _run_status(state: TrainState, run: RecordedRun) -> str:
    """Return `finished`, or the stage and step that a run has reached."""
    stages, name = run.stages, state.rung.name
    if len(state.stage_ends) >= len(stages):
        return "finished"
    if state.stage_ended:
        return f"unfinished: after stage {name}, {len(state.rungs)} of {len(stages)}"
    steps = stages[name].steps if name in stages else "?"
    return f"unfinished: stage {name}, step {state.stage_step}/{steps}"


def _loss_points(
    state: TrainState, times: Sequence[float | None] | None, prior_cost: PriorCost
) -> tuple[LossPoint, ...]:
    """Return the validations of a run with their cumulative cost.

    Args:
        state: counters and validations of the run.
        times: wall time of each validation, seconds; None: not recorded.
        prior_cost: cost of the source of the run.
    """
    if times is None:
        times = [None] * len(state.validation)
    return tuple(
        LossPoint(
            step=row.step,
            rung=row.stage,
            tokens=row.tokens + (prior_cost.tokens or 0),
            flops=row.flops + (prior_cost.flops or 0.0),
            seconds=None if seconds is None else seconds + (prior_cost.seconds or 0.0),
            loss=row.loss,
        )
        for row, seconds in zip(state.validation, times, strict=True)
    )


def _read_evaluations(
    run: Path, last_step: int, weights: Mapping[str, int]
) -> tuple[list[JSONObject], list[SkippedPath]]:
    """Read the results of evaluations of a run's checkpoints.

    Args:
        run: directory of the run.
        last_step: results of later checkpoints are ignored.
        weights: SHA-256 of the weights of each checkpoint on disk, mapped to its step.
    """
    evaluations: list[JSONObject] = []
    skipped = []
    for path in results_files(run):
        try:
            results = read_results(path)
        except UserError:
            reason = "damaged, or not results of tokengrow eval; delete it and evaluate again"
            skipped.append(SkippedPath(path=path, reason=reason))
            continue
        evaluated = results["checkpoint"]
        step = evaluated["step"]
        if step in weights.values() and weights.get(evaluated["weights_sha256"]) != step:
            reason = f"its weights differ from those of step {step} on disk; evaluate again"
            skipped.append(SkippedPath(path=path, reason=reason))
        elif step <= last_step:
            evaluations.append(results)
    return evaluations, skipped
