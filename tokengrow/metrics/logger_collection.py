"""Loggers of a run: their config, and the collection that writes to all of them."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml

from tokengrow.errors import Stopped, UserError
from tokengrow.files import read_yaml, write_atomically
from tokengrow.metrics.loggers import (
    CsvRunLogger,
    MLflowConfig,
    MLflowRunLogger,
    RunLogger,
    SessionStatus,
    TensorBoardRunLogger,
    WandbConfig,
    WandbRunLogger,
)

LoggerKind = Literal["csv", "tensorboard", "wandb", "mlflow"]

LOGGER_LIBRARIES: dict[LoggerKind, tuple[str, ...]] = {
    "csv": (),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),  # the last two are for a local database
}
"""Logger to the libraries that its extra installs."""

LOGGER_IDS_FILE = "logger_ids.yaml"
"""File in the run directory with the run ids with which loggers resume."""


@dataclass(frozen=True, kw_only=True)
class LoggerConfig:
    """Loggers of a run and their settings."""

    kinds: list[LoggerKind] = field(default_factory=lambda: ["csv"])
    """Any of csv (logs/version_N/metrics.csv), tensorboard (tensorboard/version_N), wandb and
    mlflow."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""
    mlflow: MLflowConfig = field(default_factory=MLflowConfig)
    """MLflow."""

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in LOGGER_LIBRARIES:
                valid = ", ".join(LOGGER_LIBRARIES)
                raise UserError(f"logger.kinds must be any of {valid}, got {kind!r}.")

    def check_installed(self) -> None:
        """Raise `UserError` if the library of a logger is missing."""
        for kind in self.kinds:
            if any(find_spec(library) is None for library in LOGGER_LIBRARIES[kind]):
                raise UserError(
                    f"logger.kinds has {kind}, which is not installed. Run pip install "
                    f"'tokengrow[{kind}]', or set logger=csv."
                )


@dataclass(frozen=True)
class RunPosition:
    """Position of a run, logged with every row of metrics; field names are names of metrics."""

    tokens: int
    """Tokens trained on."""
    flops: float
    """FLOPs of training."""
    stage: int
    """Index of the stage."""
    parameters: int
    """Number of parameters of the model."""


class LoggerCollection:
    """Loggers of one session, opened once the run starts to train.

    It is a context manager that closes them with the status of the session.
    """

    def __init__(self, config: LoggerConfig, out: Path) -> None:
        self._config, self._out = config, out
        self._loggers: list[RunLogger] = []

    def open(self, recipe: Mapping[str, Any]) -> None:
        """Open every logger, resuming the run of an earlier session.

        Args:
            recipe: the resolved recipe, as plain values.

        Raises:
            UserError: a service does not answer, or requires a login.
        """
        config, out, path = self._config, self._out, self._out / LOGGER_IDS_FILE
        factories: dict[LoggerKind, Callable[[str | None], RunLogger]] = {
            "csv": lambda _: CsvRunLogger(out),
            "tensorboard": lambda _: TensorBoardRunLogger(out),
            "wandb": lambda run_id: WandbRunLogger(config.wandb, out, run_id),
            "mlflow": lambda run_id: MLflowRunLogger(config.mlflow, out, run_id),
        }
        previous_ids = read_yaml(path) if path.exists() else {}
        run_ids = dict(previous_ids)
        for kind in dict.fromkeys(config.kinds):
            logger = factories[kind](previous_ids.get(kind))
            self._loggers.append(logger)
            logger.log_recipe(recipe)
            if logger.run_id is not None:
                run_ids[kind] = logger.run_id
        if run_ids != previous_ids:
            write_atomically(path, yaml.safe_dump(run_ids).encode())

    def log_metrics(self, metrics: Mapping[str, float], position: RunPosition, step: int) -> None:
        """Log the metrics of an update or a validation.

        Args:
            metrics: values by name.
            position: position of the run.
            step: number of updates done.
        """
        self._log({**metrics, **asdict(position)}, step)

    def log_growth(self, stage: str, parameters: int, drift: float, text: str, step: int) -> None:
        """Log a growth: the metrics `parameters` and `growth/drift`, and a text event.

        Args:
            stage: name of the stage that starts with it.
            parameters: number of parameters of the grown model.
            drift: largest measured |delta logit|.
            text: description of the growth.
            step: number of updates before it.
        """
        self._log({"parameters": parameters, "growth/drift": drift}, step)
        for logger in self._loggers:
            logger.log_event(f"growth/{stage}", text, step)

    def _log(self, metrics: Mapping[str, float], step: int) -> None:
        for logger in self._loggers:
            logger.log_metrics(dict(metrics), step)

    def __enter__(self) -> "LoggerCollection":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        status: SessionStatus = "success"
        if kind is not None:
            failed = issubclass(kind, Exception) and not issubclass(kind, Stopped)
            status = "failed" if failed else "killed"
        for logger in self._loggers:
            logger.close(status)
