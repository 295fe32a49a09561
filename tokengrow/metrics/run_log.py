"""Where metrics go, and what every row of them holds."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from tokengrow.checkpoint.schema import TrainState
from tokengrow.errors import Stopped, UserError
from tokengrow.files import read_yaml, write_atomically
from tokengrow.metrics.loggers import (
    CsvLog,
    MLflowConfig,
    MLflowLog,
    RunLogger,
    TensorBoardLog,
    WandbConfig,
    WandbLog,
)

LOGGERS = {
    "csv": (),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
}
"""Logger to the libraries of its extra; those behind the first keep a local database."""

IDS_FILE = "logger_ids.yaml"
"""In the run's folder: by which id a logger goes on with the run."""


@dataclass(frozen=True, kw_only=True)
class LoggerConfig:
    """Which loggers a run has."""

    kinds: list[str] = field(default_factory=lambda: ["csv"])
    """Any of csv (logs/version_N/metrics.csv), tensorboard (tensorboard/version_N), wandb and
    mlflow."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""
    mlflow: MLflowConfig = field(default_factory=MLflowConfig)
    """MLflow."""

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in LOGGERS:
                raise UserError(f"logger.kinds {kind!r}: valid are {', '.join(LOGGERS)}")

    def check_installed(self) -> None:
        """Refuses a logger whose library is not there."""
        for kind in self.kinds:
            if any(find_spec(library) is None for library in LOGGERS[kind]):
                raise UserError(
                    f"logger.kinds names {kind}, which is not installed: "
                    f"pip install 'tokengrow[{kind}]', or set logger=csv"
                )


class RunLog:
    """The loggers of one session, which are opened once there is something to train.

    As a context it ends them, and tells them how the session ended.
    """

    def __init__(self, config: LoggerConfig, out: Path) -> None:
        self._config, self._out = config, out
        self._loggers: list[RunLogger] = []

    def open(self, recipe: Mapping[str, Any]) -> None:
        """Opens every logger, going on with the run that an earlier session began.

        Args:
            recipe: the resolved one, as plain values.

        Raises:
            UserError: a service that does not answer, or wants a login.
        """
        config, out, path = self._config, self._out, self._out / IDS_FILE
        openers: dict[str, Callable[[str | None], RunLogger]] = {
            "csv": lambda _: CsvLog(out),
            "tensorboard": lambda _: TensorBoardLog(out),
            "wandb": lambda run_id: WandbLog(config.wandb, out, run_id),
            "mlflow": lambda run_id: MLflowLog(config.mlflow, out, run_id),
        }
        before = read_yaml(path) if path.exists() else {}
        ids = dict(before)
        for kind in dict.fromkeys(config.kinds):
            logger = openers[kind](before.get(kind))
            self._loggers.append(logger)
            logger.begin(recipe)
            if logger.run_id is not None:
                ids[kind] = logger.run_id
        if ids != before:
            write_atomically(path, yaml.safe_dump(ids).encode())

    def write(self, metrics: Mapping[str, float], state: TrainState) -> None:
        """Logs metrics of an update or a validation, and where the run stands."""
        position = {
            "tokens": state.tokens,
            "flops": state.flops,
            "stage": state.stage,
            "parameters": state.rung.parameters,
        }
        self._log({**metrics, **position}, state.step)

    def mark_growth(self, stage: str, parameters: int, drift: float, text: str, step: int) -> None:
        """Marks a growth: `parameters` jumps, `growth/drift` has a value, and a sentence says it.

        Args:
            stage: that begins with it.
            parameters: of the grown model.
            drift: largest |delta logit| measured.
            text: what happened.
            step: updates before it.
        """
        self._log({"parameters": parameters, "growth/drift": drift}, step)
        for logger in self._loggers:
            logger.mark(f"growth/{stage}", text, step)

    def _log(self, metrics: Mapping[str, float], step: int) -> None:
        for logger in self._loggers:
            logger.log_metrics(dict(metrics), step)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        status = "success"
        if kind is not None:
            failed = issubclass(kind, Exception) and not issubclass(kind, Stopped)
            status = "failed" if failed else "killed"
        for logger in self._loggers:
            logger.end(status)
