"""Output of every logger, read back: metrics, growths, the recipe, and runs of two sessions."""

import csv
import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from killed import killed_at

from tokengrow.data.store import TokenStore
from tokengrow.errors import UserError
from tokengrow.metrics.logger_collection import LoggerCollection, LoggerConfig
from tokengrow.metrics.loggers import MLflowConfig, WandbConfig
from tokengrow.training.config import TrainConfig
from tokengrow.training.trainer import FitResult, fit

pytest.importorskip("mlflow", reason="needs the extra mlflow")
pytest.importorskip("wandb", reason="needs the extra wandb")

from mlflow import MlflowClient
from mlflow.entities import Run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

OFFLINE = WandbConfig(mode="offline")
FIRST_STEPS, SECOND_STEPS = (2, 4, 6), (8,)
"""Steps logged in two sessions; the first is killed at step 6, in the second stage."""


@dataclass(frozen=True)
class LoggedRun:
    """Run of two sessions."""

    config: TrainConfig
    result: FitResult
    status_when_killed: str
    """Status of the MLflow run after the first session."""

    @property
    def out(self) -> Path:
        return Path(self.config.out)


@pytest.fixture(scope="module")
def logged(
    tiny_run: Callable[..., TrainConfig],
    store: TokenStore,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LoggedRun]:
    """Run of two rungs with four updates each, in every logger; tests must not write to it."""
    out = tmp_path_factory.mktemp("logged") / "run"
    logger = LoggerConfig(kinds=["csv", "tensorboard", "wandb", "mlflow"], wandb=OFFLINE)
    run = tiny_run(out, rungs=(8, 12), steps=4, checkpoint_every=2, logger=logger)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with killed_at(6):
            fit(run, store)
        killed = mlflow_run(out).info.status
        yield LoggedRun(run, fit(run, store), killed)


def growth_text(logged: LoggedRun) -> str:
    small, large = (stage.model.num_parameters() for stage in logged.config.stages)
    drift = logged.result.state.rungs[1].drift
    return f"grown {small:,} -> {large:,} parameters: logits moved by at most {drift:.1e}"


# CSV


def rows(logged: LoggedRun, session: int) -> list[dict[str, str]]:
    with (logged.out / "logs" / f"version_{session}" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_csv_has_a_row_for_each_logged_update_and_validation(logged: LoggedRun) -> None:
    training = {int(row["step"]): row for row in rows(logged, 0) if row["train/loss"]}
    assert tuple(training) == FIRST_STEPS
    assert float(training[2]["train/lr"]) == pytest.approx(3e-3)  # end of a warm-up of 2 steps
    assert float(training[4]["train/lr"]) == pytest.approx(3e-4)  # min_lr
    assert float(training[4]["tokens"]) == 4 * 4 * 32
    assert float(training[4]["train/grad_norm"]) > 0
    losses = [float(row["validation/loss"]) for row in rows(logged, 0) if row["validation/loss"]]
    history = [row.loss for row in logged.result.state.validation]
    assert losses == pytest.approx(history[: len(losses)])


def test_rows_have_throughput_and_memory(logged: LoggedRun) -> None:
    row = next(row for row in rows(logged, 0) if row["train/loss"])
    assert float(row["tokens_per_second"]) > 0
    assert 0.01 < float(row["peak_memory_gb"]) < 1000
    assert "mfu" not in row, "the peak of a CPU is unknown"
    assert "tokens_per_second_per_device" not in row, "there is one device"


def test_growth_is_a_csv_row_with_drift_and_parameters(logged: LoggedRun) -> None:
    small, large = (stage.model.num_parameters() for stage in logged.config.stages)
    (growth,) = (row for row in rows(logged, 0) if row["growth/drift"])
    assert int(growth["step"]) == 4
    assert float(growth["growth/drift"]) == logged.result.state.rungs[1].drift
    parameters = [int(row["parameters"]) for row in rows(logged, 0)]
    index = rows(logged, 0).index(growth)
    assert set(parameters[:index]) == {small}
    assert set(parameters[index:]) == {large}


def test_each_session_writes_its_own_csv(logged: LoggedRun) -> None:
    assert tuple(int(row["step"]) for row in rows(logged, 1) if row["train/loss"]) == SECOND_STEPS


# TensorBoard


@pytest.fixture(scope="module")
def events(logged: LoggedRun) -> EventAccumulator:
    """TensorBoard events of the first session."""
    return EventAccumulator(str(logged.out / "tensorboard" / "version_0")).Reload()


def test_tensorboard_has_the_metrics(events: EventAccumulator) -> None:
    assert tuple(event.step for event in events.Scalars("train/loss")) == FIRST_STEPS
    assert [event.step for event in events.Scalars("validation/loss")] == [0, 3, 4, 4]


def test_tensorboard_has_a_text_for_a_growth(logged: LoggedRun, events: EventAccumulator) -> None:
    (text,) = events.Tensors("growth/n12/text_summary")
    assert text.step == 4
    assert text.tensor_proto.string_val[0].decode() == growth_text(logged)


def test_tensorboard_has_the_recipe(events: EventAccumulator) -> None:
    (text,) = events.Tensors("recipe/text_summary")
    assert b"\nbatch_size: 4\n" in text.tensor_proto.string_val[0]


# Weights & Biases


def wandb_records(file: Path) -> Iterator[Any]:
    """Yield the records of a run's file: LevelDB's log format after a header of 7 bytes."""
    data, offset, payload = file.read_bytes(), 7, b""
    while offset < len(data):
        rest = 2**15 - offset % 2**15
        if rest < 7:  # the rest of a block is too short for a header
            offset += rest
            continue
        _, length, kind = struct.unpack("<IHB", data[offset : offset + 7])
        payload += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # a full record, or its last fragment
            yield Record.FromString(payload)
            payload = b""


def wandb_sessions(logged: LoggedRun) -> list[Path]:
    return sorted((logged.out / "wandb").glob("offline-run-*/run-*.wandb"))


def wandb_history(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a session's history."""
    return [
        {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in wandb_records(file)
        if record.HasField("history")
    ]


def test_wandb_has_the_metrics_offline(logged: LoggedRun) -> None:
    history = wandb_history(wandb_sessions(logged)[0])
    training = [row for row in history if "train/loss" in row]
    assert tuple(row["trainer/global_step"] for row in training) == FIRST_STEPS
    csv_losses = [float(row["train/loss"]) for row in rows(logged, 0) if row["train/loss"]]
    assert [row["train/loss"] for row in training] == csv_losses


def test_wandb_has_the_growth_in_its_summary(logged: LoggedRun) -> None:
    file = wandb_sessions(logged)[0]
    (growth,) = (row for row in wandb_history(file) if "growth/drift" in row)
    assert growth["trainer/global_step"] == 4
    assert growth["parameters"] == logged.config.stages[1].model.num_parameters()
    summary = {
        item.key or item.nested_key[0]: item.value_json
        for record in wandb_records(file)
        for item in record.summary.update
    }
    assert json.loads(summary["growth/n12"]) == growth_text(logged)


def test_resumed_run_continues_the_same_wandb_run(logged: LoggedRun) -> None:
    first, second = wandb_sessions(logged)
    assert first.name == second.name, "the name of the file contains the id of the run"
    training = [row for row in wandb_history(second) if "train/loss" in row]
    assert tuple(row["trainer/global_step"] for row in training) == SECOND_STEPS


def test_wandb_has_the_recipe(logged: LoggedRun) -> None:
    config = {
        item.key: json.loads(item.value_json)
        for record in wandb_records(wandb_sessions(logged)[0])
        for item in record.config.update
    }
    assert config["stages"]["n12"]["steps"] == 4


def test_wandb_without_a_login_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    loggers = LoggerCollection(
        LoggerConfig(kinds=["wandb"], wandb=WandbConfig(mode="online")), tmp_path
    )
    with pytest.raises(UserError, match=r"API key.* or set logger\.wandb\.mode=offline"):
        loggers.open({})


# MLflow


def mlflow_client(out: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{out / 'mlflow.db'}")


def mlflow_run(out: Path) -> Run:
    """Return the only run in the database."""
    client = mlflow_client(out)
    experiment = client.get_experiment_by_name("tokengrow")
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def test_resumed_run_continues_the_same_mlflow_run(logged: LoggedRun) -> None:
    run = mlflow_run(logged.out)
    history = mlflow_client(logged.out).get_metric_history(run.info.run_id, "train/loss")
    assert tuple(metric.step for metric in history) == FIRST_STEPS + SECOND_STEPS
    assert logged.status_when_killed == "FAILED"
    assert run.info.status == "FINISHED"


def test_mlflow_has_a_tag_and_drift_for_a_growth(logged: LoggedRun) -> None:
    run = mlflow_run(logged.out)
    assert run.data.tags["growth/n12"] == growth_text(logged)
    (growth,) = mlflow_client(logged.out).get_metric_history(run.info.run_id, "growth/drift")
    assert growth.step == 4


def test_mlflow_has_the_recipe(logged: LoggedRun) -> None:
    run = mlflow_run(logged.out)
    assert run.data.params["stages/n12/steps"] == "4"
    assert run.info.run_name == logged.config.out


def test_finished_run_unsets_the_mlflow_tracking_uri(logged: LoggedRun) -> None:
    assert "MLFLOW_TRACKING_URI" not in os.environ, "mlflow sets it during a run"


def test_mlflow_keeps_the_recipe_of_the_first_session(tmp_path: Path) -> None:
    logger = LoggerConfig(kinds=["mlflow"])
    for recipe in ({"micro_batch_size": 4}, {"micro_batch_size": 2}):
        with LoggerCollection(logger, tmp_path) as loggers:
            loggers.open(recipe)
    assert mlflow_run(tmp_path).data.params == {"micro_batch_size": "4"}


def test_two_mlflow_runs_share_a_database(
    tmp_path: Path,
) -> None:
    uri = f"sqlite:///{tmp_path / 'all.db'}"
    logger = LoggerConfig(kinds=["mlflow"], mlflow=MLflowConfig(tracking_uri=uri))
    for name, step in (("first", 3), ("second", 4)):
        (tmp_path / name).mkdir()
        with LoggerCollection(logger, tmp_path / name) as loggers:
            loggers.open({})
            loggers.log_growth("n12", 900, 1e-9, "grown", step)
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("tokengrow").experiment_id])
    growths = [client.get_metric_history(run.info.run_id, "growth/drift") for run in runs]
    assert sorted(growth.step for (growth,) in growths) == [3, 4]
    assert {run.data.tags["growth/n12"] for run in runs} == {"grown"}


def test_interrupted_run_is_killed_and_a_deleted_run_replaced(tmp_path: Path) -> None:
    loggers = LoggerCollection(LoggerConfig(kinds=["mlflow"]), tmp_path)
    with pytest.raises(KeyboardInterrupt), loggers:
        loggers.open({})
        raise KeyboardInterrupt
    first = mlflow_run(tmp_path)
    assert first.info.status == "KILLED"
    mlflow_client(tmp_path).delete_run(first.info.run_id)
    with LoggerCollection(LoggerConfig(kinds=["mlflow"]), tmp_path) as loggers:
        loggers.open({})
    assert mlflow_run(tmp_path).info.run_id != first.info.run_id


def test_unsupported_mlflow_store_is_an_error(tmp_path: Path) -> None:
    store = MLflowConfig(tracking_uri=f"file:{tmp_path / 'mlruns'}")
    loggers = LoggerCollection(LoggerConfig(kinds=["mlflow"], mlflow=store), tmp_path)
    with pytest.raises(UserError, match=r"logger\.mlflow\.tracking_uri=file:.*sqlite:///FILE"):
        loggers.open({})


# All loggers


def test_finished_run_opens_no_logger(logged: LoggedRun, store: TokenStore) -> None:
    before = sorted(logged.out.rglob("*"))
    fit(replace(logged.config, logger=LoggerConfig(kinds=["csv", "wandb"], wandb=OFFLINE)), store)
    assert sorted(logged.out.rglob("*")) == before
