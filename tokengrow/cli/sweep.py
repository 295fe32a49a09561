"""A sweep: what its jobs share, a row for each of them, and at its end one table and sweep.csv.

Jobs may run in other processes or on other machines, and may die there. Each therefore keeps its
row in a file in the sweep's folder, and whoever started the sweep reads them all.
"""

import json
import math
import os
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

from tokengrow.cli.config import plain_values
from tokengrow.cli.errors import error_message, refuse
from tokengrow.cli.sweep_rows import (
    DONE,
    FAILED,
    Row,
    folder_name,
    short_groups,
    sweep_table,
    write_csv,
)
from tokengrow.distributed.launch import find_launch, process_rank
from tokengrow.errors import Stopped, UserError
from tokengrow.files import write_atomically
from tokengrow.training.config import TrainConfig
from tokengrow.training.recipe import resolve_train
from tokengrow.training.resume import CONFIG_FILE
from tokengrow.training.trainer import FitResult

TABLE_FILE = "sweep.csv"
ROWS_FOLDER = ".jobs"
"""Beside the jobs' folders: a JSON file for each of them."""

FAILED_JOBS = 1
"""Exit status of a sweep some of whose jobs failed."""

SWEEPS = "docs/sweeps.md"
"""Where several devices for each job are explained."""


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
        self.folder = Path(config.hydra.sweep.dir).resolve()
        try:
            _check_started_once()
            _check_holds_no_run(self.folder)
            for fabric in _fabrics(config, overrides):
                check_processes(fabric, config.hydra.launcher)
        except UserError as error:  # which Hydra would turn into a warning
            refuse(config.hydra.job.name, str(error))
        self.made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        given = {each.key_or_group: each for each in overrides}  # of two the later one counts
        self.fixed = frozenset(key for key, each in given.items() if not each.is_sweep_override())
        self.began = time.time_ns()
        # A job's own `out` may differ: it is made of its name, which comes from its recipe.
        folder = QuotedString(text=str(self.folder), quote=Quote.single).with_quotes()
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir={folder}")
        if "submitit_folder" in config.hydra.launcher:  # else nothing is seen until the table
            logs = Path(config.hydra.launcher.submitit_folder).resolve().parent
            Console(highlight=False, soft_wrap=True).print(f"{'logs':<11} {logs}", markup=False)
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
        settings = short_groups(
            {each.key_or_group: str(each.get_value_element_as_str()) for each in varied}
        )
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
        if process_rank() > 0:
            return
        path = self._file(row.folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(row), indent=2).encode())

    def rows(self) -> list[Row]:
        """Of all jobs in the sweep's folder, best first; what is not done comes last."""
        assert self.folder is not None
        rows = [self._row(path) for path in (self.folder / ROWS_FOLDER).glob("*.json")]
        return sorted(rows, key=lambda row: row.rank)

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


def run_job(config: DictConfig, train: Callable[[TrainConfig, Console], FitResult]) -> float | None:
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
    console = Console(highlight=False, soft_wrap=True, markup=False, quiet=process_rank() > 0)
    console.print(f"job {before.job}  {before.label}")
    sweep.write(before)
    start = time.perf_counter()
    row = before
    try:
        values = plain_values(config) | {"out": str(sweep.folder / before.folder)}
        check_processes(values["fabric"], hydra.launcher)
        result = train(resolve_train(values), _progress(hydra))
        row = replace(before, **_figures(result))
    except Stopped:  # by SIGTERM, which is meant for the sweep
        raise
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
            f"{', '.join(several)}: a job of a sweep is one process on one device; set "
            "fabric=single, or start the runs one after the other in a loop of the shell, or have "
            f"Slurm start the processes of each job ({SWEEPS})"
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
    console.print(sweep_table(rows), soft_wrap=False)
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
    if (sentence := error_message("train", error)) is not None:
        return sentence
    traceback.print_exception(error)
    return (f"{type(error).__name__}: {error}".splitlines())[0]


def _progress(hydra: Any) -> Console:
    """Where a job shows its progress: nowhere beside others on the same terminal."""
    beside_others = hydra.runtime.choices["hydra/launcher"] == "joblib"
    return Console(quiet=beside_others or process_rank() > 0)


def _check_started_once() -> None:
    """Refuses to be one of several processes, each of which would run the whole sweep."""
    launch = find_launch()
    # Lightning's own children are found by no launcher: they get this variable.
    world = launch.devices * launch.num_nodes if launch else int(os.environ.get("WORLD_SIZE") or 1)
    if world > 1:
        raise UserError(
            f"--multirun was started in {world} processes, each of which would run the whole "
            "sweep: start it without torchrun, srun and fabric run"
        )


def _check_holds_no_run(folder: Path) -> None:
    """Refuses to put jobs between the checkpoints of a run."""
    if (folder / CONFIG_FILE).is_file():
        raise UserError(f"out={folder} holds a run: give the sweep another out=")


def _fabrics(config: DictConfig, overrides: Sequence[Override]) -> Iterator[dict[str, Any]]:
    """The fabric section as it is, and with each value over which one of its keys is swept."""
    fabric: Any = OmegaConf.to_container(config.fabric, resolve=True)
    yield fabric
    for each in overrides:
        section, _, key = each.key_or_group.partition(".")
        if section == "fabric" and key and each.is_discrete_sweep():
            yield from ({**fabric, key: value} for value in each.sweep_iterator())


def _parsed(overrides: Sequence[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(overrides))
