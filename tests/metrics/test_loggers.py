"""What a run leaves in its loggers, read back: metrics, growths as marks, one run over sessions."""

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
from tokengrow.metrics.loggers import MLflowConfig, WandbConfig
from tokengrow.metrics.run_log import LoggerConfig, RunLog
from tokengrow.training.config import TrainConfig
from tokengrow.training.trainer import FitResult, fit

pytest.importorskip("mlflow", reason="needs the extra mlflow")
pytest.importorskip("wandb", reason="needs the extra wandb")

from mlflow import MlflowClient
from mlflow.entities import Run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

OFFLINE = WandbConfig(mode="offline")
FIRST, THEN = (2, 4, 6), (8,)
"""Steps logged in two sessions: killed at step 6, in the middle of the second stage."""


@dataclass(frozen=True)
class Logged:
    """A run of two sessions."""

    run: TrainConfig
    result: FitResult
    status_when_killed: str
    """Of the MLflow run."""

    @property
    def out(self) -> Path:
        return Path(self.run.out)


@pytest.fixture(scope="module")
def logged(
    tiny_run: Callable[..., TrainConfig],
    store: TokenStore,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Logged]:
    """Two rungs of four updates, in every logger; not to be written to."""
    out = tmp_path_factory.mktemp("logged") / "run"
    logger = LoggerConfig(kinds=["csv", "tensorboard", "wandb", "mlflow"], wandb=OFFLINE)
    run = tiny_run(out, rungs=(8, 12), steps=4, checkpoint_every=2, logger=logger)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with killed_at(6):
            fit(run, store)
        killed = mlflow_run(out).info.status
        yield Logged(run, fit(run, store), killed)


def growth_text(logged: Logged) -> str:
    small, large = (stage.model.num_parameters() for stage in logged.run.stages)
    drift = logged.result.state.rungs[1].drift
    return f"grown {small:,} -> {large:,} parameters: logits moved by at most {drift:.1e}"


# CSV


def rows(logged: Logged, session: int) -> list[dict[str, str]]:
    with (logged.out / "logs" / f"version_{session}" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_csv_has_a_row_for_every_logged_update_and_validation(logged: Logged) -> None:
    trained = {int(row["step"]): row for row in rows(logged, 0) if row["train/loss"]}
    assert tuple(trained) == FIRST
    assert float(trained[2]["train/lr"]) == pytest.approx(3e-3)  # the end of a warm-up of 2
    assert float(trained[4]["train/lr"]) == pytest.approx(3e-4)  # min_lr
    assert float(trained[4]["tokens"]) == 4 * 4 * 32
    assert float(trained[4]["train/grad_norm"]) > 0
    validated = [float(row["validation/loss"]) for row in rows(logged, 0) if row["validation/loss"]]
    history = [row.loss for row in logged.result.state.validation]
    assert validated == pytest.approx(history[: len(validated)])


def test_a_row_tells_how_the_device_is_used(logged: Logged) -> None:
    row = next(row for row in rows(logged, 0) if row["train/loss"])
    assert float(row["tokens_per_second"]) > 0
    assert 0.01 < float(row["peak_memory_gb"]) < 1000
    assert "mfu" not in row, "a CPU has no peak that is known"
    assert "tokens_per_second_per_device" not in row, "there is one"


def test_a_growth_is_a_row_at_which_the_parameters_jump(logged: Logged) -> None:
    small, large = (stage.model.num_parameters() for stage in logged.run.stages)
    (mark,) = (row for row in rows(logged, 0) if row["growth/drift"])
    assert int(mark["step"]) == 4
    assert float(mark["growth/drift"]) == logged.result.state.rungs[1].drift
    parameters = [int(row["parameters"]) for row in rows(logged, 0)]
    where = rows(logged, 0).index(mark)
    assert set(parameters[:where]) == {small}
    assert set(parameters[where:]) == {large}


def test_each_session_writes_a_csv_of_its_own(logged: Logged) -> None:
    assert tuple(int(row["step"]) for row in rows(logged, 1) if row["train/loss"]) == THEN


# TensorBoard


@pytest.fixture(scope="module")
def events(logged: Logged) -> EventAccumulator:
    """Of the first session."""
    return EventAccumulator(str(logged.out / "tensorboard" / "version_0")).Reload()


def test_tensorboard_has_the_metrics(events: EventAccumulator) -> None:
    assert tuple(event.step for event in events.Scalars("train/loss")) == FIRST
    assert [event.step for event in events.Scalars("validation/loss")] == [0, 3, 4, 4]


def test_tensorboard_has_a_text_at_a_growth(logged: Logged, events: EventAccumulator) -> None:
    (text,) = events.Tensors("growth/n12/text_summary")
    assert text.step == 4
    assert text.tensor_proto.string_val[0].decode() == growth_text(logged)


def test_tensorboard_has_the_recipe(events: EventAccumulator) -> None:
    (text,) = events.Tensors("recipe/text_summary")
    assert b"\nbatch_size: 4\n" in text.tensor_proto.string_val[0]


# Weights & Biases


def wandb_records(file: Path) -> Iterator[Any]:
    """Records of a run's file: LevelDB's log format behind a header of 7 bytes."""
    data, at, whole = file.read_bytes(), 7, b""
    while at < len(data):
        room = 2**15 - at % 2**15
        if room < 7:  # the rest of a block that is too short for a header
            at += room
            continue
        _, length, part = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):  # whole, or its last part
            yield Record.FromString(whole)
            whole = b""


def wandb_sessions(logged: Logged) -> list[Path]:
    return sorted((logged.out / "wandb").glob("offline-run-*/run-*.wandb"))


def wandb_history(file: Path) -> list[dict[str, Any]]:
    """Rows of a session's history."""
    return [
        {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in wandb_records(file)
        if record.HasField("history")
    ]


def test_wandb_has_the_metrics_without_a_network(logged: Logged) -> None:
    history = wandb_history(wandb_sessions(logged)[0])
    trained = [row for row in history if "train/loss" in row]
    assert tuple(row["trainer/global_step"] for row in trained) == FIRST
    there = [float(row["train/loss"]) for row in rows(logged, 0) if row["train/loss"]]
    assert [row["train/loss"] for row in trained] == there


def test_wandb_has_a_mark_at_a_growth(logged: Logged) -> None:
    file = wandb_sessions(logged)[0]
    (mark,) = (row for row in wandb_history(file) if "growth/drift" in row)
    assert mark["trainer/global_step"] == 4
    assert mark["parameters"] == logged.run.stages[1].model.num_parameters()
    summary = {
        item.key or item.nested_key[0]: item.value_json
        for record in wandb_records(file)
        for item in record.summary.update
    }
    assert json.loads(summary["growth/n12"]) == growth_text(logged)


def test_a_resumed_run_goes_on_with_the_same_wandb_run(logged: Logged) -> None:
    first, then = wandb_sessions(logged)
    assert first.name == then.name, "the file's name holds the run's id"
    trained = [row for row in wandb_history(then) if "train/loss" in row]
    assert tuple(row["trainer/global_step"] for row in trained) == THEN


def test_wandb_has_the_recipe(logged: Logged) -> None:
    config = {
        item.key: json.loads(item.value_json)
        for record in wandb_records(wandb_sessions(logged)[0])
        for item in record.config.update
    }
    assert config["stages"]["n12"]["steps"] == 4


def test_wandb_without_a_login_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    log = RunLog(LoggerConfig(kinds=["wandb"], wandb=WandbConfig(mode="online")), tmp_path)
    with pytest.raises(UserError, match=r"API key.* or set logger\.wandb\.mode=offline"):
        log.open({})


# MLflow


def mlflow_client(out: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{out / 'mlflow.db'}")


def mlflow_run(out: Path) -> Run:
    """The only run in the database."""
    client = mlflow_client(out)
    experiment = client.get_experiment_by_name("tokengrow")
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def test_a_resumed_run_goes_on_with_the_same_mlflow_run(logged: Logged) -> None:
    run = mlflow_run(logged.out)
    history = mlflow_client(logged.out).get_metric_history(run.info.run_id, "train/loss")
    assert tuple(metric.step for metric in history) == FIRST + THEN
    assert logged.status_when_killed == "FAILED"
    assert run.info.status == "FINISHED"


def test_mlflow_has_a_mark_at_a_growth(logged: Logged) -> None:
    run = mlflow_run(logged.out)
    assert run.data.tags["growth/n12"] == growth_text(logged)
    (mark,) = mlflow_client(logged.out).get_metric_history(run.info.run_id, "growth/drift")
    assert mark.step == 4


def test_mlflow_has_the_recipe(logged: Logged) -> None:
    run = mlflow_run(logged.out)
    assert run.data.params["stages/n12/steps"] == "4"
    assert run.info.run_name == logged.run.out


def test_the_next_run_of_the_process_has_a_database_of_its_own(logged: Logged) -> None:
    assert "MLFLOW_TRACKING_URI" not in os.environ, "mlflow sets it for as long as a run lasts"


def test_what_was_begun_with_another_recipe_keeps_its_parameters(tmp_path: Path) -> None:
    logger = LoggerConfig(kinds=["mlflow"])
    for recipe in ({"micro_batch_size": 4}, {"micro_batch_size": 2}):
        with RunLog(logger, tmp_path) as log:
            log.open(recipe)
    assert mlflow_run(tmp_path).data.params == {"micro_batch_size": "4"}


def test_runs_side_by_side_in_one_database_have_their_metrics_when_they_end(
    tmp_path: Path,
) -> None:
    uri = f"sqlite:///{tmp_path / 'all.db'}"
    logger = LoggerConfig(kinds=["mlflow"], mlflow=MLflowConfig(tracking_uri=uri))
    for name, step in (("one", 3), ("other", 4)):
        (tmp_path / name).mkdir()
        with RunLog(logger, tmp_path / name) as log:
            log.open({})
            log.mark_growth("n12", 900, 1e-9, "grown", step)
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("tokengrow").experiment_id])
    marks = [client.get_metric_history(run.info.run_id, "growth/drift") for run in runs]
    assert sorted(mark.step for (mark,) in marks) == [3, 4]
    assert {run.data.tags["growth/n12"] for run in runs} == {"grown"}


def test_an_interrupted_run_is_killed_and_a_deleted_one_begins_anew(tmp_path: Path) -> None:
    log = RunLog(LoggerConfig(kinds=["mlflow"]), tmp_path)
    with pytest.raises(KeyboardInterrupt), log:
        log.open({})
        raise KeyboardInterrupt
    first = mlflow_run(tmp_path)
    assert first.info.status == "KILLED"
    mlflow_client(tmp_path).delete_run(first.info.run_id)
    with RunLog(LoggerConfig(kinds=["mlflow"]), tmp_path) as log:
        log.open({})
    assert mlflow_run(tmp_path).info.run_id != first.info.run_id


def test_a_store_that_mlflow_refuses_is_one_sentence(tmp_path: Path) -> None:
    store = MLflowConfig(tracking_uri=f"file:{tmp_path / 'mlruns'}")
    log = RunLog(LoggerConfig(kinds=["mlflow"], mlflow=store), tmp_path)
    with pytest.raises(UserError, match=r"logger\.mlflow\.tracking_uri=file:.*sqlite:///FILE"):
        log.open({})


# All of them


def test_a_finished_run_called_again_opens_no_logger(logged: Logged, store: TokenStore) -> None:
    before = sorted(logged.out.rglob("*"))
    fit(replace(logged.run, logger=LoggerConfig(kinds=["csv", "wandb"], wandb=OFFLINE)), store)
    assert sorted(logged.out.rglob("*")) == before
