"""Sweeps: shared state of the jobs, a row per job, and a final table with sweep.csv.

Jobs may run in other processes or on other machines, and may be killed there. Each job therefore
writes its row to a file in the directory of the sweep, and the process that started the sweep reads
all of them.
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
from tokengrow.distributed.launch import detect_launch, rank_from_env
from tokengrow.errors import Stopped, UserError
from tokengrow.files import write_atomically
from tokengrow.training.config import TrainConfig
from tokengrow.training.recipe import resolve_train
from tokengrow.training.resume import CONFIG_FILE
from tokengrow.training.trainer import FitResult

TABLE_FILE = "sweep.csv"
ROWS_FOLDER = ".jobs"
"""Directory next to those of the jobs, with a JSON file per job."""

FAILED_JOBS = 1
"""Exit status of a sweep with failed jobs."""

SWEEPS = "docs/sweeps.md"
"""Page on sweeps whose jobs use several devices."""


@dataclass
class Sweep(Callback):
    """State that the jobs of a sweep share; Hydra's launchers copy it to their processes."""

    folder: Path | None = None
    """Directory of the sweep; None outside of one."""
    fixed: frozenset[str] = frozenset()
    """Keys that the command line sets to one value."""
    began: int = 0
    """Start of the sweep, ns since the epoch."""
    made: list[Path] = field(default_factory=list)
    """Directories that the sweep created, innermost first."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Check the sweep, and give all jobs one directory."""
        overrides = _parsed(config.hydra.overrides.task)
        self.folder = Path(config.hydra.sweep.dir).resolve()
        try:
            _check_started_once()
            _check_holds_no_run(self.folder)
            for fabric in _fabrics(config, overrides):
                check_processes(fabric, config.hydra.launcher)
        except UserError as error:  # Hydra would turn it into a warning
            refuse(config.hydra.job.name, str(error))
        self.made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        given = {each.key_or_group: each for each in overrides}  # the last one counts
        self.fixed = frozenset(key for key, each in given.items() if not each.is_sweep_override())
        self.began = time.time_ns()
        # The `out` of a job may differ, because it contains the name of its recipe.
        folder = QuotedString(text=str(self.folder), quote=Quote.single).with_quotes()
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir={folder}")
        if "submitit_folder" in config.hydra.launcher:  # otherwise nothing is shown until the table
            logs = Path(config.hydra.launcher.submitit_folder).resolve().parent
            Console(highlight=False, soft_wrap=True).print(f"{'logs':<11} {logs}", markup=False)
        _ACTIVE.set(self)

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Activate the sweep in the process of a job."""
        if self.folder is not None:
            _ACTIVE.set(self)

    def enter(self, number: int, overrides: Sequence[str]) -> Row:
        """Return the row of a job that starts, with its tokens and time from earlier sweeps.

        Args:
            number: number of the job.
            overrides: overrides of the job, as Hydra lists them.
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
        """Write the row of a job, in its first process."""
        if rank_from_env() > 0:
            return
        path = self._file(row.folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(row), indent=2).encode())

    def rows(self) -> list[Row]:
        """Return the rows of all jobs in the directory, best first, unfinished ones last."""
        assert self.folder is not None
        rows = [self._row(path) for path in (self.folder / ROWS_FOLDER).glob("*.json")]
        return sorted(rows, key=lambda row: row.rank)

    def remove_empty_directories(self) -> None:
        """Remove what Hydra wrote before the sweep failed to start."""
        if self.folder in self.made:
            with suppress(OSError):  # other files were added
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
"""Running sweep, in the process that started it and in those of its jobs."""


def run_job(config: DictConfig, train: Callable[[TrainConfig, Console], FitResult]) -> float | None:
    """Run one job of a sweep, and write its row whether it succeeds or fails.

    Args:
        config: composed config of the job.
        train: trains a run, and shows progress on a console.

    Returns:
        The objective, or None if the job failed, which does not end the sweep.
    """
    sweep, hydra = _ACTIVE.get(), HydraConfig.get()
    assert sweep is not None and sweep.folder is not None
    before = sweep.enter(hydra.job.num, hydra.overrides.task)
    console = Console(highlight=False, soft_wrap=True, markup=False, quiet=rank_from_env() > 0)
    console.print(f"job {before.job}  {before.label}")
    sweep.write(before)
    start = time.perf_counter()
    row = before
    try:
        values = plain_values(config) | {"out": str(sweep.folder / before.folder)}
        check_processes(values["fabric"], hydra.launcher)
        result = train(resolve_train(values), _progress(hydra))
        row = replace(before, **_result_columns(result))
    except Stopped:  # SIGTERM ends the sweep
        raise
    except Exception as error:
        row = replace(before, status=FAILED, tokens=None, error=_failure_reason(error))
    finally:
        if row.status != DONE or row.tokens != before.tokens:  # otherwise it was done before
            row = replace(row, seconds=before.seconds + time.perf_counter() - start)
        sweep.write(row)
    outcome = f"failed: {row.error}" if row.error else f"validation loss {row.loss:.5f}"
    console.print(f"job {row.job}  {outcome}")
    return row.loss


def check_processes(fabric: Mapping[str, Any], launcher: Mapping[str, Any]) -> None:
    """Check that the launcher starts all processes of a job.

    Otherwise Lightning would start the others with the same command line, and each of them would
    run the entire sweep.

    Args:
        fabric: the `fabric` section of a job.
        launcher: settings of Hydra's launcher.

    Raises:
        UserError: the job needs another number of processes than the launcher starts.
    """
    started = {"devices": "tasks_per_node", "num_nodes": "nodes"}
    wanted = {key: fabric.get(key) for key in started}
    if str(launcher["_target_"]).endswith("SlurmLauncher"):
        for key, by in started.items():
            if wanted[key] not in (None, launcher[by]):
                raise UserError(
                    f"hydra.launcher.{by} must be {wanted[key]}, the value of fabric.{key}, got "
                    f"{launcher[by]}. Change one of them."
                )
        return
    several = [f"fabric.{key}={value}" for key, value in wanted.items() if value not in (None, 1)]
    if fabric.get("strategy") not in (None, "auto") and wanted["devices"] is None:
        several.append(f"fabric.strategy={fabric['strategy']} (which uses all GPUs)")
    for by in started.values():
        if launcher.get(by, 1) != 1:
            several.append(f"hydra.launcher.{by}={launcher[by]}")
    if several:
        raise UserError(
            f"A job of a sweep must be one process on one device, got {', '.join(several)}. Set "
            "fabric=single, start the runs from a shell loop, or let Slurm start the processes of "
            f"each job ({SWEEPS})."
        )


@contextmanager
def sweep_report() -> Iterator[None]:
    """Write sweep.csv and print the table when the sweep in the block ends; else do nothing."""
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
    """Write sweep.csv, print the table, and return the number of failed jobs."""
    assert sweep.folder is not None
    rows = sweep.rows()
    if not rows:
        sweep.remove_empty_directories()
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


def _result_columns(result: FitResult) -> dict[str, Any]:
    """Return the columns of a finished job."""
    state = result.state
    loss = state.rung.loss_end
    assert loss is not None
    if not math.isfinite(loss):
        raise UserError(f"The validation loss is {loss}: the run diverged.")
    return {
        "status": DONE,
        "loss": loss,
        "parameters": state.rung.parameters,
        "tokens": state.tokens,
        "flops": state.flops,
    }


def _failure_reason(error: Exception) -> str:
    """Return why a job failed, in one line; print the traceback unless the input was wrong."""
    if (message := error_message("train", error)) is not None:
        return message
    traceback.print_exception(error)
    return (f"{type(error).__name__}: {error}".splitlines())[0]


def _progress(hydra: Any) -> Console:
    """Return the console of a job; a quiet one if jobs share the terminal."""
    shares_terminal = hydra.runtime.choices["hydra/launcher"] == "joblib"
    return Console(quiet=shares_terminal or rank_from_env() > 0)


def _check_started_once() -> None:
    """Raise `UserError` if a launcher started several processes, each with the entire sweep."""
    launch = detect_launch()
    # Lightning sets this variable for the processes that it starts.
    world = launch.devices * launch.num_nodes if launch else int(os.environ.get("WORLD_SIZE") or 1)
    if world > 1:
        raise UserError(
            f"--multirun must be started in one process, got {world}, each of which would run the "
            "entire sweep. Start it without torchrun, srun or fabric run."
        )


def _check_holds_no_run(folder: Path) -> None:
    """Raise `UserError` if the directory is that of a run."""
    if (folder / CONFIG_FILE).is_file():
        raise UserError(f"out={folder} holds a run. Choose another out= for the sweep.")


def _fabrics(config: DictConfig, overrides: Sequence[Override]) -> Iterator[dict[str, Any]]:
    """Yield the `fabric` section of every job."""
    fabric: Any = OmegaConf.to_container(config.fabric, resolve=True)
    yield fabric
    for each in overrides:
        section, _, key = each.key_or_group.partition(".")
        if section == "fabric" and key and each.is_discrete_sweep():
            yield from ({**fabric, key: value} for value in each.sweep_iterator())


def _parsed(overrides: Sequence[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(overrides))
