"""Records of a checkpoint: round trips, older versions, and refused content."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokengrow.checkpoint import layout
from tokengrow.checkpoint.schema import (
    SCHEMA_VERSION,
    LineageEntry,
    RecordedRun,
    Rung,
    TokensFrom,
    TrainState,
    WallTimes,
)
from tokengrow.checkpoint.store import Checkpoint, load_checkpoint, save_checkpoint
from tokengrow.errors import UserError
from tokengrow.files import read_yaml, write_yaml

VERSION_0_STATE: dict[str, Any] = {
    "fingerprint": "9da3a20e",
    "next_batch": 280,
    "step": 280,
    "stage": 1,
    "stage_step": 120,
    "tokens": 573440,
    "flops": 3705290096640.0,
    "rungs": [
        {"name": "small", "parameters": 786688, "loss_end": 4.4377},
        {"name": "medium", "parameters": 1310976, "drift": 7.1e-15, "loss_end": None},
    ],
    "validation": [{"step": 0, "stage": 0, "tokens": 0, "flops": 0.0, "loss": 7.6453}],
    "stage_ends": [160],
    "skipped_in_a_row": 0,
    "source": None,
}
"""Content of train_state.json as written before schema versions, shortened."""


class TestTrainState:
    def test_version_0_is_read(self) -> None:
        state = TrainState.from_dict(VERSION_0_STATE)
        assert [rung.ends_at for rung in state.rungs] == [160, None]
        assert (state.stage_ends, state.stage_ended) == ([160], False)
        assert state.validation[0].loss == 7.6453

    def test_round_trip(self) -> None:
        state = TrainState.from_dict(VERSION_0_STATE)
        assert TrainState.from_dict(state.to_dict()) == state

    def test_leaving_a_stage_records_its_end(self) -> None:
        state = TrainState("tokens", step=7)
        state.enter(0, Rung("small", parameters=10))
        state.advance(tokens=8, flops_per_token=2)
        state.leave(loss=3.0)
        assert (state.stage_ends, state.rung.loss_end, state.flops) == ([8], 3.0, 16)

    def test_outside_run_keeps_position_and_cost(self) -> None:
        state = TrainState.from_dict(VERSION_0_STATE).outside_run()
        assert (state.step, state.next_batch, state.tokens) == (280, 280, 573440)
        assert not state.in_run

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"epoch": 1}, "train_state.json: unknown key epoch"),
            ({"rungs": [{"parameters": 1}]}, "train_state.json: rungs: name is missing"),
            ({"validation": [3.0]}, "train_state.json: validation must be a mapping, got float"),
        ],
    )
    def test_invalid_content_is_refused(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            TrainState.from_dict({**VERSION_0_STATE, **change}, "train_state.json")

    def test_a_missing_key_is_refused(self) -> None:
        with pytest.raises(UserError, match="fingerprint is missing"):
            TrainState.from_dict({"step": 3})


class TestRecordedRun:
    def test_round_trip_keeps_every_key(self) -> None:
        values = {
            "out": "runs/a",
            "seed": 1,
            "batch_size": 16,
            "source": None,
            "stages": {
                "small": {
                    "name": "small",
                    "steps": 3,
                    "model": {"width": 8},
                    "optim": {"lr": 0.1},
                    "plateau": None,
                }
            },
            "tokens_from": {"data": {"source": "stdlib"}, "tokenizer": {}, "store": None},
            "log_every": 5,
        }
        run = RecordedRun.from_dict(values)
        assert run.stages["small"].steps == 3
        assert run.tokens_from == TokensFrom({"source": "stdlib"}, {}, None)
        assert run.to_dict() == values

    def test_an_unknown_key_of_a_stage_is_refused(self) -> None:
        stages = {"small": {"steps": 1, "model": {}, "optim": {}, "epochs": 2}}
        with pytest.raises(UserError, match=r"run: stages\.small: unknown key epochs"):
            RecordedRun.from_dict({"stages": stages})


class TestLineageEntry:
    def test_growth_has_no_operation_key(self, full_checkpoint: Callable[..., Checkpoint]) -> None:
        (entry,) = full_checkpoint().lineage
        values = entry.to_dict()
        assert "operation" not in values
        assert values["new_block_place"] == "spread"
        assert LineageEntry.from_dict(values) == entry

    def test_a_missing_drift_is_refused(self, full_checkpoint: Callable[..., Checkpoint]) -> None:
        values = full_checkpoint().lineage[0].to_dict()
        del values["drift"]
        with pytest.raises(UserError, match="lineage: drift is missing"):
            LineageEntry.from_dict(values)


def test_wall_times_outside_a_run_have_no_validations() -> None:
    times = WallTimes(seconds=7.0, before=None)
    assert times.to_dict() == {"seconds": 7.0, "before": None}
    assert WallTimes.from_dict(times.to_dict()) == times


class TestVersion:
    @pytest.fixture
    def saved(self, tmp_path: Path, full_checkpoint: Callable[..., Checkpoint]) -> Path:
        """A checkpoint on disk."""
        return save_checkpoint(tmp_path / "step_00000003", full_checkpoint())

    def _rewrite(self, folder: Path, version: int | None) -> None:
        config = read_yaml(folder / layout.CONFIG)
        config["schema_version"] = version
        if version is None:
            del config["schema_version"]
        write_yaml(folder / layout.CONFIG, config)
        (folder / layout.COMPLETE).unlink()
        layout.write_marker(folder)

    def test_the_version_is_written(self, saved: Path) -> None:
        assert read_yaml(saved / layout.CONFIG)["schema_version"] == SCHEMA_VERSION

    def test_a_checkpoint_without_a_version_is_read(self, saved: Path) -> None:
        self._rewrite(saved, None)
        assert load_checkpoint(saved).step == 3

    def test_a_newer_version_is_refused(self, saved: Path) -> None:
        self._rewrite(saved, SCHEMA_VERSION + 1)
        with pytest.raises(UserError, match=r"schema_version must be at most 1, got 2.* Upgrade"):
            load_checkpoint(saved)
