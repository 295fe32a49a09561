"""Lightning's loggers, extended by the recipe, text events and the status of a session.

Names of metrics contain slashes, which all of these loggers show as groups.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import yaml
from lightning.fabric.loggers.csv_logs import CSVLogger
from lightning.fabric.loggers.tensorboard import TensorBoardLogger
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger

from tokengrow.console.format import first_line
from tokengrow.errors import UserError

LOG = logging.getLogger(__name__)

WANDB_MODES = ("online", "offline")

SessionStatus = Literal["success", "failed", "killed"]
"""Status of a session at its end."""

MLFLOW_STATUS: dict[SessionStatus, str] = {
    "success": "FINISHED",
    "failed": "FAILED",
    "killed": "KILLED",
}
"""Status of a session to MLflow's status of a run."""


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Project and mode of Weights & Biases."""

    project: str = "tokengrow"
    """Project of the run."""
    entity: str | None = None
    """User or team of the project; null: WANDB_ENTITY, otherwise that of the login."""
    mode: str | None = None
    """online, or offline (`wandb sync` uploads it later); null: WANDB_MODE, otherwise online."""

    def __post_init__(self) -> None:
        if self.mode not in (*WANDB_MODES, None):
            valid = ", ".join(WANDB_MODES)
            raise UserError(f"logger.wandb.mode must be one of {valid}, null, got {self.mode!r}.")


@dataclass(frozen=True, kw_only=True)
class MLflowConfig:
    """Experiment and server of MLflow."""

    experiment: str = "tokengrow"
    """Experiment of the run."""
    tracking_uri: str | None = None
    """Server or database; null: MLFLOW_TRACKING_URI, otherwise mlflow.db in the run directory."""


class RunLogger(Protocol):
    """Interface of a logger of a run."""

    @property
    def run_id(self) -> str | None:
        """Id with which a later session resumes the run; None: each session is a run of its own."""

    def log_recipe(self, recipe: Mapping[str, Any]) -> None:
        """Log the resolved recipe."""

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Log numbers by name."""

    def log_event(self, name: str, text: str, step: int) -> None:
        """Log a sentence about an event at a step."""

    def close(self, status: SessionStatus) -> None:
        """End the session."""


class CsvRunLogger(CSVLogger):
    """Logger that writes logs/version_N/metrics.csv, row by row."""

    run_id = None

    def __init__(self, out: Path) -> None:
        super().__init__(root_dir=out, name="logs", flush_logs_every_n_steps=1)

    def log_recipe(self, recipe: Mapping[str, Any]) -> None:
        """Do nothing: the recipe is in config.yaml of the run directory."""

    def log_event(self, name: str, text: str, step: int) -> None:
        """Do nothing: rows hold only numbers."""

    def close(self, status: SessionStatus) -> None:
        """Do nothing: every row is already on the disk."""


class TensorBoardRunLogger(TensorBoardLogger):
    """Logger that writes tensorboard/version_N; the recipe and events are under Text."""

    run_id = None

    def __init__(self, out: Path) -> None:
        super().__init__(root_dir=out, name="tensorboard")

    def log_recipe(self, recipe: Mapping[str, Any]) -> None:
        """Log the recipe as YAML text.

        Hyperparameters of TensorBoard would come with a metric of -1 that no run logs.
        """
        text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
        self.experiment.add_text("recipe", f"```yaml\n{text}```")

    def log_event(self, name: str, text: str, step: int) -> None:
        """Log a text card at a step."""
        self.experiment.add_text(name, text, step)

    def close(self, status: SessionStatus) -> None:
        """Flush the event file."""
        self.finalize(status)


class WandbRunLogger(WandbLogger):
    """Logger to Weights & Biases, with its files in wandb/; events are in the run's summary."""

    STEP = "trainer/global_step"
    """Lightning's name for the horizontal axis."""

    def __init__(self, config: WandbConfig, out: Path, run_id: str | None) -> None:
        import wandb

        try:
            run = wandb.init(
                project=config.project,
                entity=config.entity,
                name=str(out),
                dir=str(out),
                id=run_id,
                resume="allow",
                mode=config.mode,  # type: ignore[arg-type]  # a Literal
                reinit="create_new",  # leaves an open run of the caller as it is
                # wandb would record each redraw of the progress display as text.
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            raise UserError(
                f"logger.kinds has wandb, which failed: {first_line(error)}. Log in (wandb "
                "login), or set logger.wandb.mode=offline."
            ) from None
        run.define_metric(self.STEP)
        run.define_metric("*", step_metric=self.STEP, step_sync=True)
        super().__init__(experiment=run)

    @property
    def run_id(self) -> str | None:
        """Id of the run in its project."""
        run_id: str | None = self.experiment.id
        return run_id

    def log_recipe(self, recipe: Mapping[str, Any]) -> None:
        """Log the recipe as the config of the run; a resumed session may change it."""
        self.log_hyperparams(dict(recipe))

    def log_event(self, name: str, text: str, step: int) -> None:
        """Set a value of the summary."""
        self.experiment.summary[name] = text

    def close(self, status: SessionStatus) -> None:
        """Wait until all data is uploaded, or in the file of an offline run."""
        self.experiment.finish(exit_code=int(status != "success"))


class MLflowRunLogger(MLFlowLogger):
    """Logger to MLflow: a server, or a database in the run directory; events are tags."""

    def __init__(self, config: MLflowConfig, out: Path, run_id: str | None) -> None:
        from mlflow.exceptions import MlflowException

        # Both log the creation of a database.
        for name in ("mlflow", "lightning.pytorch.loggers.mlflow"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self._environment_uri = os.environ.get("MLFLOW_TRACKING_URI")
        given_uri = config.tracking_uri or self._environment_uri
        uri = given_uri or f"sqlite:///{(out / 'mlflow.db').absolute()}"
        # Asynchronous with a server, so that training neither waits for it nor stops while it is
        # unreachable.
        self._synchronous = False if given_uri else None
        try:
            resumes = run_id is not None and _is_active(uri, run_id)
            super().__init__(
                experiment_name=config.experiment,
                run_name=str(out),
                tracking_uri=uri,
                artifact_location=None if given_uri else str((out / "mlartifacts").absolute()),
                run_id=run_id if resumes else None,
                synchronous=self._synchronous,
            )
            if resumes:
                self.experiment.update_run(run_id, status="RUNNING")
            self._is_new, _ = not resumes, self.run_id  # reading the id creates a new run
        except MlflowException as error:
            raise UserError(
                f"logger.mlflow.tracking_uri={uri} failed: {first_line(error)}. Give the URI of a "
                "reachable server, or of a database (sqlite:///FILE)."
            ) from None

    def log_recipe(self, recipe: Mapping[str, Any]) -> None:
        """Log the recipe as parameters in the first session; MLflow does not let them change."""
        if self._is_new:
            self.log_hyperparams(dict(recipe))

    def log_event(self, name: str, text: str, step: int) -> None:
        """Set a tag of the run."""
        self.experiment.set_tag(self.run_id, name, text, synchronous=self._synchronous)

    def close(self, status: SessionStatus) -> None:
        """End the run, and restore the environment for the next run of this process."""
        import mlflow
        from mlflow.exceptions import MlflowException

        try:
            mlflow.flush_async_logging()
            self.finalize(MLFLOW_STATUS[status])
        except MlflowException as error:  # the checkpoints are saved, so an error is only logged
            LOG.error("MLflow did not record the end of the run: %s", first_line(error))
        mlflow.set_tracking_uri(self._environment_uri)  # None unsets it


def _is_active(uri: str, run_id: str) -> bool:
    """Return whether a run is in the database and not deleted."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        return bool(MlflowClient(uri).get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
