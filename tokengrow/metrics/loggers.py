"""Lightning's loggers, each with the three things that a run asks of it besides metrics.

Names of metrics hold slashes, which every one of them shows as groups.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml
from lightning.fabric.loggers.csv_logs import CSVLogger
from lightning.fabric.loggers.tensorboard import TensorBoardLogger
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger

from tokengrow.console.format import first_line
from tokengrow.errors import UserError

LOG = logging.getLogger(__name__)

WANDB_MODES = ("online", "offline")
MLFLOW_STATUS = {"success": "FINISHED", "failed": "FAILED", "killed": "KILLED"}


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Where Weights & Biases keeps a run."""

    project: str = "tokengrow"
    """That lists the run."""
    entity: str | None = None
    """User or team of the project; null: WANDB_ENTITY, else that of the login."""
    mode: str | None = None
    """online, or offline (`wandb sync` uploads it later); null: WANDB_MODE, else online."""

    def __post_init__(self) -> None:
        if self.mode not in (*WANDB_MODES, None):
            raise UserError(
                f"logger.wandb.mode {self.mode!r}: valid are {', '.join(WANDB_MODES)}, null"
            )


@dataclass(frozen=True, kw_only=True)
class MLflowConfig:
    """Where MLflow keeps a run."""

    experiment: str = "tokengrow"
    """That lists the run."""
    tracking_uri: str | None = None
    """Server or database; null: MLFLOW_TRACKING_URI, else mlflow.db in the run's folder."""


class RunLogger(Protocol):
    """What a run asks of a logger."""

    @property
    def run_id(self) -> str | None:
        """By which a later session goes on with the same run; None where each has its own."""

    def begin(self, recipe: Mapping[str, Any]) -> None:
        """Takes the resolved recipe."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Takes numbers by name."""

    def mark(self, name: str, text: str, step: int) -> None:
        """Takes a sentence about what happened at a step."""

    def end(self, status: str) -> None:
        """The session is over: success, failed or killed."""


class CsvLog(CSVLogger):
    """logs/version_N/metrics.csv, on the disk row by row."""

    run_id = None

    def __init__(self, out: Path) -> None:
        super().__init__(root_dir=out, name="logs", flush_logs_every_n_steps=1)

    def begin(self, recipe: Mapping[str, Any]) -> None:
        """The recipe is in the run's config.yaml."""

    def mark(self, name: str, text: str, step: int) -> None:
        """A row of numbers is all that it can hold."""

    def end(self, status: str) -> None:
        """Nothing is left to write."""


class TensorBoardLog(TensorBoardLogger):
    """tensorboard/version_N; the recipe and marks are under Text."""

    run_id = None

    def __init__(self, out: Path) -> None:
        super().__init__(root_dir=out, name="tensorboard")

    def begin(self, recipe: Mapping[str, Any]) -> None:
        """As YAML: as hyperparameters they would come with a metric of -1 that nobody logs."""
        text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
        self.experiment.add_text("recipe", f"```yaml\n{text}```")

    def mark(self, name: str, text: str, step: int) -> None:
        """A card of its own at the step."""
        self.experiment.add_text(name, text, step)

    def end(self, status: str) -> None:
        """Flushes what is left."""
        self.finalize(status)


class WandbLog(WandbLogger):
    """Weights & Biases, whose own files lie in wandb/; marks are in the run's summary."""

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
                reinit="create_new",  # a run that the caller has open stays as it is
                # The display of a terminal redraws itself: it is no text to be recorded.
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            raise UserError(
                f"logger.kinds names wandb: {first_line(error)}: log in (wandb login), or set "
                "logger.wandb.mode=offline"
            ) from None
        run.define_metric(self.STEP)
        run.define_metric("*", step_metric=self.STEP, step_sync=True)
        super().__init__(experiment=run)

    @property
    def run_id(self) -> str | None:
        """Of the run in its project."""
        return self.experiment.id

    def begin(self, recipe: Mapping[str, Any]) -> None:
        """As the run's config; a resumed session may have changed it."""
        self.log_hyperparams(dict(recipe))

    def mark(self, name: str, text: str, step: int) -> None:
        """By its name in the summary."""
        self.experiment.summary[name] = text

    def end(self, status: str) -> None:
        """Waits until all is uploaded, or in the file of an offline run."""
        self.experiment.finish(exit_code=int(status != "success"))


class MLflowLog(MLFlowLogger):
    """MLflow: a server, or a database in the run's folder; marks are tags of the run."""

    def __init__(self, config: MLflowConfig, out: Path, run_id: str | None) -> None:
        from mlflow.exceptions import MlflowException

        for name in ("mlflow", "lightning.pytorch.loggers.mlflow"):  # that a database is made
            logging.getLogger(name).setLevel(logging.ERROR)
        self._environment = os.environ.get("MLFLOW_TRACKING_URI")
        given = config.tracking_uri or self._environment
        uri = given or f"sqlite:///{(out / 'mlflow.db').absolute()}"
        # Training neither waits for a server nor ends because one is away for a while.
        self._synchronous = False if given else None
        try:
            known = run_id is not None and _is_active(uri, run_id)
            super().__init__(
                experiment_name=config.experiment,
                run_name=str(out),
                tracking_uri=uri,
                artifact_location=None if given else str((out / "mlartifacts").absolute()),
                run_id=run_id if known else None,
                synchronous=self._synchronous,
            )
            if known:
                self.experiment.update_run(run_id, status="RUNNING")
            self._is_new, _ = not known, self.run_id  # asking for its id starts a new run
        except MlflowException as error:
            raise UserError(
                f"logger.mlflow.tracking_uri={uri}: {first_line(error)}: give that of a server "
                "that answers, or of a database (sqlite:///FILE)"
            ) from None

    def begin(self, recipe: Mapping[str, Any]) -> None:
        """As parameters, which MLflow never lets change: those of the first session stay."""
        if self._is_new:
            self.log_hyperparams(dict(recipe))

    def mark(self, name: str, text: str, step: int) -> None:
        """By its name among the tags."""
        self.experiment.set_tag(self.run_id, name, text, synchronous=self._synchronous)

    def end(self, status: str) -> None:
        """Ends the run, and leaves the environment to the next one as it was."""
        import mlflow
        from mlflow.exceptions import MlflowException

        try:
            mlflow.flush_async_logging()
            self.finalize(MLFLOW_STATUS[status])
        except MlflowException as error:  # what was trained is saved, and worth a sentence alone
            LOG.error("mlflow did not take the end of the run: %s", first_line(error))
        mlflow.set_tracking_uri(self._environment)  # None unsets it


def _is_active(uri: str, run_id: str) -> bool:
    """Whether MLflow still has a run; another server, or one who deleted it, has not."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        return MlflowClient(uri).get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
