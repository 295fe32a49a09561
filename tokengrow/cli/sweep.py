"""A sweep: what its jobs share, a row for each of them, and at its end one table and sweep.csv.

Jobs may run in other processes or on other machines, and may die there. Each therefore keeps its
row in a file in the sweep's folder, and whoever started the sweep reads them all.
"""

import csv
import hashlib
import io
import json
import math
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from tokengrow.cli.explain import explain, refuse
from tokengrow.cli.resolve import TrainArguments, plain, resolve_train
from tokengrow.errors import UserError
from tokengrow.evaluation.format import count, power, table, three_digits
from tokengrow.files import write_atomically
from tokengrow.training.fit import FitResult

TABLE_FILE = "sweep.csv"
ROWS_FOLDER = ".jobs"
"""Beside the jobs' folders: a JSON file for each of them."""

DONE, FAILED, UNFINISHED = "done", "failed", "unfinished"

FAILED_JOBS = 1
"""Exit status of a sweep some of whose jobs failed."""

LONGEST_NAME = 120
"""Characters of a job's folder; a longer one is cut, and ends with a hash of the whole."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A job: what it set, and what came of it."""

    folder: str
    """Of its run, in the sweep's."""
    settings: Mapping[str, str]
    """The keys that the sweep varies, and their values in this job."""
    job: int | None
    """Its number; None: of an earlier sweep into the same folder."""
    sweep: int
    """When the sweep was started in which the job ran last, ns since the epoch."""
    status: str = UNFINISHED
    """done, failed, or unfinished: running, or killed."""
    error: str | None = None
    """Why it failed."""
    loss: float | None = None
    """Last validation loss, nats per token: the objective."""
    parameters: int | None = None
    """Of the last model."""
    tokens: int | None = None
    """Trained on in all stages."""
    flops: float | None = None
    """Spent in all stages."""
    seconds: float = 0.0
    """Wall-clock time of the sessions that trained."""

    @property
    def label(self) -> str:
        """The settings, as typed."""
        return " ".join(f"{key}={value}" for key, value in self.settings.items())


COLUMNS = ("loss", "parameters", "tokens", "flops", "seconds", "status", "error", "folder")
"""Of sweep.csv, behind the job and the keys that were varied."""


@dataclass
class Sweep(Callback):
    """What the jobs of a sweep share. Hydra's launchers carry it into their processes."""

    folder: Path | None = None
    """Of the sweep; None outside of one."""
    fixed: frozenset[str] = frozenset()
    """Keys that the command line gives and does not vary."""
    began: int = 0
    """ns since the epoch."""
    made: list[Path] = field(default_factory=list)
    """Folders that were not there before, innermost first."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Refuses what cannot be swept; then every job works in one folder."""
        overrides = _parsed(config.hydra.overrides.task)
        try:
            _check_started_once()
            for fabric in _fabrics(config, overrides):
                check_processes(fabric, config.hydra.launcher)
        except UserError as error:  # which Hydra would turn into a warning
            refuse(config.hydra.job.name, str(error))
        self.folder = Path(config.hydra.sweep.dir).resolve()
        self.made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self.fixed = frozenset(
            each.key_or_group for each in overrides if not each.is_sweep_override()
        )
        self.began = time.time_ns()
        # A job's own `out` may differ: it is made of its name, which comes from its recipe.
        folder = QuotedString(text=str(self.folder), quote=Quote.single).with_quotes()
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir={folder}")
        _ACTIVE.set(self)

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """In the job's process, which need not be the one that started the sweep."""
        if self.folder is not None:
            _ACTIVE.set(self)

    def enter(self, number: int, overrides: Sequence[str]) -> Row:
        """The row of a job that begins: what was known of it, and is not over.

        Args:
            number: of the job.
            overrides: its own, as Hydra lists them.
        """
        varied = [each for each in _parsed(overrides) if each.key_or_group not in self.fixed]
        settings = {each.key_or_group: str(each.get_value_element_as_str()) for each in varied}
        name = folder_name(settings) or str(number)
        before = self._row(self._file(name)) if self._file(name).exists() else None
        return Row(
            folder=name,
            settings=settings,
            job=number,
            sweep=self.began,
            tokens=before.tokens if before else None,
            seconds=before.seconds if before else 0.0,
        )

    def write(self, row: Row) -> None:
        """Keeps a job's row; of several processes of a job the first one does."""
        if os.environ.get("SLURM_PROCID", "0") != "0":
            return
        path = self._file(row.folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(row), indent=2).encode())

    def rows(self) -> list[Row]:
        """Of all jobs in the sweep's folder, best first; what is not done comes last."""
        assert self.folder is not None
        rows = [self._row(path) for path in (self.folder / ROWS_FOLDER).glob("*.json")]
        return sorted(rows, key=lambda row: (_objective(row), row.sweep, row.job or 0))

    def forget_nothing_written(self) -> None:
        """Removes what Hydra writes before it finds that a sweep cannot begin."""
        if self.folder in self.made:
            with suppress(OSError):  # something else is there by now
                (self.folder / "multirun.yaml").unlink(missing_ok=True)
                for folder in self.made:
                    folder.rmdir()

    def _file(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / ROWS_FOLDER / f"{name}.json"

    def _row(self, path: Path) -> Row:
        row = Row(**json.loads(path.read_text()))
        return row if row.sweep == self.began else replace(row, job=None)


_ACTIVE: ContextVar[Sweep | None] = ContextVar("sweep", default=None)
"""The sweep that is running, in the process that started it and in those of its jobs."""


def run_job(
    config: DictConfig, climb: Callable[[TrainArguments, Console], FitResult]
) -> float | None:
    """Runs one job of a sweep and keeps its row, whatever comes of it.

    Args:
        config: the job's.
        climb: trains a run, showing its progress on a console.

    Returns:
        The objective, or None from a job that failed, which does not end the sweep.
    """
    sweep, hydra = _ACTIVE.get(), HydraConfig.get()
    assert sweep is not None and sweep.folder is not None
    before = sweep.enter(hydra.job.num, hydra.overrides.task)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(f"job {before.job}  {before.label}")
    sweep.write(before)
    start = time.perf_counter()
    row = before
    try:
        values = plain(config) | {"out": str(sweep.folder / before.folder)}
        check_processes(values["fabric"], hydra.launcher)
        result = climb(resolve_train(values), _progress(hydra))
        row = replace(before, **_figures(result))
    except Exception as error:
        row = replace(before, status=FAILED, tokens=None, error=_reason(error))
    finally:
        if row.status != DONE or row.tokens != before.tokens:  # else it was done before
            row = replace(row, seconds=before.seconds + time.perf_counter() - start)
        sweep.write(row)
    outcome = f"failed: {row.error}" if row.error else f"validation loss {row.loss:.5f}"
    console.print(f"job {row.job}  {outcome}")
    return row.loss


def check_processes(fabric: Mapping[str, Any], launcher: Mapping[str, Any]) -> None:
    """Refuses jobs of several processes, unless the launcher starts as many.

    Lightning would start the others by running the command line again, and each of them would run
    the whole sweep.

    Args:
        fabric: the section of a job's config.
        launcher: Hydra's, with its settings.

    Raises:
        UserError: what the job wants is not what it gets.
    """
    started = {"devices": "tasks_per_node", "num_nodes": "nodes"}
    wanted = {key: fabric.get(key) for key in started}
    if str(launcher["_target_"]).endswith("SlurmLauncher"):
        for key, by in started.items():
            if wanted[key] not in (None, launcher[by]):
                raise UserError(
                    f"fabric.{key}={wanted[key]}, but each job of the sweep would have "
                    f"hydra.launcher.{by}={launcher[by]}: set that to {wanted[key]}"
                )
        return
    several = [f"fabric.{key}={value}" for key, value in wanted.items() if value not in (None, 1)]
    if fabric.get("strategy") not in (None, "auto") and wanted["devices"] is None:
        several.append(f"fabric.strategy={fabric['strategy']} (which takes all GPUs)")
    for by in started.values():
        if launcher.get(by, 1) != 1:
            several.append(f"hydra.launcher.{by}={launcher[by]}")
    if several:
        raise UserError(
            f"{', '.join(several)}: a job of a sweep is one process on one device; give "
            "fabric.devices=1, start the runs one after the other (for lr in 3e-4 6e-4; do torchrun "
            "... optim.lr=$lr out=runs/$lr; done), or have Slurm start the processes of each job "
            "(hydra/launcher=submitit_slurm hydra.launcher.tasks_per_node=N)"
        )


@contextmanager
def sweep_report() -> Iterator[None]:
    """Ends a sweep with its table and sweep.csv, however it ends; other commands with nothing."""
    token = _ACTIVE.set(None)
    failed = 0
    try:
        yield
    finally:
        sweep = _ACTIVE.get()
        _ACTIVE.reset(token)
        if sweep is not None:
            failed = _report(sweep)
    if failed:
        raise SystemExit(FAILED_JOBS)


def folder_name(settings: Mapping[str, str]) -> str:
    """A job's folder, after what it sets: the same job is found again in a larger sweep."""
    whole = ",".join(f"{key}={value}" for key, value in settings.items())
    name = re.sub(r"[^\w.,=+-]", "_", whole)
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Writes the rows, with a column for each key that one of them sets."""
    keys = _keys(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, ["job", *keys, *COLUMNS], extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        writer.writerow({**asdict(row), **row.settings})
    write_atomically(path, text.getvalue().encode())


def sweep_table(rows: Sequence[Row], title: str) -> Table:
    """One line per job; why one failed, and the folders, stand in sweep.csv."""
    keys = _keys(rows)
    headers = (
        *(key.replace(".", ".\n") for key in keys),
        "validation\nloss",
        "para-\nmeters",
        "tokens",
        "FLOPs",
        "seconds",
        "status",
    )
    made = table(title, "job", headers)
    for row in rows:
        made.add_row(
            _shown(row.job, str),
            *(row.settings.get(key, "") for key in keys),
            _shown(row.loss, "{:.5f}".format),
            _shown(row.parameters, count),
            _shown(row.tokens, count),
            _shown(row.flops, power),
            three_digits(row.seconds),
            row.status,
        )
    return made


def _report(sweep: Sweep) -> int:
    """Writes and shows a sweep's end; gives the number of its jobs that failed."""
    assert sweep.folder is not None
    rows = sweep.rows()
    if not rows:
        sweep.forget_nothing_written()
        return 0
    path = sweep.folder / TABLE_FILE
    write_csv(rows, path)
    console = Console(highlight=False, soft_wrap=True)
    console.print()
    console.print(sweep_table(rows, f"{len(rows)} jobs, the best one first"), soft_wrap=False)
    failed = [row for row in rows if row.error and row.job is not None]
    for row in failed:
        console.print(f"job {row.job} failed: {row.error}", markup=False)
    if rows[0].loss is not None:
        console.print(f"{'best':<11} {sweep.folder / rows[0].folder}", markup=False)
    console.print(f"{'table':<11} {path}", markup=False)
    return len(failed)


def _figures(result: FitResult) -> dict[str, Any]:
    """What a row says of a job that is done."""
    state = result.state
    loss = state.rung.loss_end
    assert loss is not None
    if not math.isfinite(loss):
        raise UserError(f"the validation loss is {loss}: the run has diverged")
    return {
        "status": DONE,
        "loss": loss,
        "parameters": state.rung.parameters,
        "tokens": state.tokens,
        "flops": state.flops,
    }


def _reason(error: Exception) -> str:
    """Why a job failed, in one line; of what is no wrong input, the traceback is printed too."""
    if (sentence := explain("train", error)) is not None:
        return sentence
    traceback.print_exception(error)
    return (f"{type(error).__name__}: {error}".splitlines())[0]


def _progress(hydra: Any) -> Console:
    """Where a job shows its progress: nowhere beside others on the same terminal."""
    return Console(quiet=hydra.runtime.choices["hydra/launcher"] == "joblib")


def _check_started_once() -> None:
    """Refuses to be one of several processes, each of which would run the whole sweep."""
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        if int(os.environ.get(name) or 1) > 1:
            raise UserError(
                f"--multirun in one of {os.environ[name]} processes ({name}), and each would run "
                "the whole sweep: start it without torchrun and srun"
            )


def _fabrics(config: DictConfig, overrides: Sequence[Override]) -> Iterator[dict[str, Any]]:
    """The fabric section as it is, and with each value over which one of its keys is swept."""
    fabric: Any = OmegaConf.to_container(config.fabric, resolve=True)
    yield fabric
    for each in overrides:
        room, _, key = each.key_or_group.partition(".")
        if room == "fabric" and each.is_sweep_override() and each.is_discrete_sweep():
            yield from ({**fabric, key: value} for value in each.sweep_iterator())


def _parsed(overrides: Sequence[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(overrides))


def _objective(row: Row) -> float:
    return math.inf if row.loss is None else row.loss


def _keys(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row.settings))


def _shown(value: Any, how: Callable[[Any], str]) -> str:
    return "-" if value is None else how(value)
