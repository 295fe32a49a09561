"""A sweep: a folder for each job, one table at the end, and nothing lost to a job that fails."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import MissingConfigException

from tokengrow.checkpoint.store import load_checkpoint
from tokengrow.cli import train as verb
from tokengrow.cli.errors import error_message
from tokengrow.cli.sweep_rows import Row, folder_name, short_groups, sweep_table
from tokengrow.data.store import TokenStore
from tokengrow.errors import Stopped

Command = Callable[..., Any]
Rows = list[dict[str, str]]


@pytest.fixture
def sweep(command: Command, store: TokenStore, tmp_path: Path) -> Command:
    """`sweep(*overrides)`: the recipe debug, one update a stage, into `tmp_path/sweep`."""
    tiny = ("recipes=debug", "model.vocab_size=512", "model.context_length=32", "fabric=cpu")
    short = ("max_steps_per_stage=1", "validation_sequences=4", f"store={store.folder}")
    out = f"out={tmp_path / 'sweep'}"
    return lambda *words: command("train", "--multirun", *tiny, *short, out, *words)


def table(folder: Path) -> Rows:
    """The rows of sweep.csv."""
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_two_seeds_are_two_runs_with_their_losses_as_objectives(
    sweep: Command, tmp_path: Path, monkeypatch: Any
) -> None:
    objectives: list[float] = []
    main = verb.main
    monkeypatch.setattr(verb, "main", lambda config: objectives.append(main(config)))
    outcome = sweep("seed=0,1")
    assert outcome.status == 0, outcome.err
    runs = [load_checkpoint(tmp_path / "sweep" / name) for name in ("seed=0", "seed=1")]
    assert [run.run.seed for run in runs] == [0, 1]
    assert [run.train_state.rungs[-1].loss_end for run in runs] == objectives
    assert objectives[0] != objectives[1]


def test_it_ends_with_a_row_for_each_job_the_best_one_first(sweep: Command, tmp_path: Path) -> None:
    outcome = sweep("optim.lr=3e-4,6e-4", "model.layers=2,3")
    assert outcome.status == 0, outcome.err
    rows = table(tmp_path / "sweep")
    assert {(row["optim.lr"], row["model.layers"]) for row in rows} == {
        ("0.0003", "2"),
        ("0.0003", "3"),
        ("0.0006", "2"),
        ("0.0006", "3"),
    }
    losses = [float(row["loss"]) for row in rows]
    assert losses == sorted(losses)
    for row in rows:
        state = load_checkpoint(tmp_path / "sweep" / row["folder"], tensors=False).train_state
        assert float(row["loss"]) == state.rungs[-1].loss_end
        assert int(row["parameters"]) == state.rungs[-1].parameters
        assert (int(row["tokens"]), float(row["flops"])) == (state.tokens, state.flops)
        assert (row["status"], row["error"]) == ("done", "")
    printed = outcome.out.partition("Jobs of the sweep, best first")[2]
    assert [line.split()[0] for line in printed.splitlines() if " done" in line] == [
        row["job"] for row in rows
    ]
    assert str(tmp_path / "sweep" / rows[0]["folder"]) in printed


def test_jobs_whose_names_differ_lie_in_the_one_folder_of_their_sweep(
    sweep: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = sweep("name=mine,yours", "out=runs/${name}")
    assert outcome.status == 0, outcome.err
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["debug"]
    assert (tmp_path / "runs" / "debug" / "name=mine" / "config.yaml").is_file()


def test_a_job_that_fails_is_told_and_the_others_are_trained(
    sweep: Command, tmp_path: Path
) -> None:
    outcome = sweep("optim.lr=-1,1e-3")
    assert outcome.status == 1
    done, failed = table(tmp_path / "sweep")
    assert (done["optim.lr"], done["status"]) == ("0.001", "done")
    assert (failed["status"], failed["loss"], failed["error"]) == (
        "failed",
        "",
        "optim.lr must be above 0, got -1.0.",
    )
    assert "job 0 failed: optim.lr must be above 0, got -1.0." in outcome.out
    assert not (tmp_path / "sweep" / failed["folder"]).exists()


def test_of_an_error_of_ours_the_traceback_is_shown_and_the_others_are_trained(
    sweep: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = verb.train

    def broken(config: Any, console: Any) -> Any:
        if config.seed == 0:
            raise ZeroDivisionError("division by zero")
        return train(config, console)

    monkeypatch.setattr(verb, "train", broken)
    outcome = sweep("seed=0,1")
    assert outcome.status == 1
    assert "Traceback" in outcome.err
    errors = {row["seed"]: row["error"] for row in table(tmp_path / "sweep")}
    assert errors == {"0": "ZeroDivisionError: division by zero", "1": ""}


def test_a_larger_sweep_goes_on_with_the_jobs_that_are_done(sweep: Command, tmp_path: Path) -> None:
    sweep("seed=choice(0)")
    (before,) = table(tmp_path / "sweep")
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}
    outcome = sweep("seed=1,0")
    assert outcome.status == 0, outcome.err
    after = {row["seed"]: row for row in table(tmp_path / "sweep")}
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert after["0"] == before | {"job": "1"}, "its seconds are those of its training"
    assert after["1"]["job"] == "0"


def test_the_jobs_of_an_earlier_sweep_stay_in_the_table_without_a_number(
    sweep: Command, tmp_path: Path
) -> None:
    sweep("optim.lr=-1,-2")
    outcome = sweep("seed=choice(0)")
    assert outcome.status == 0, "the jobs that failed are none of this sweep's"
    jobs = {row["folder"]: row["job"] for row in table(tmp_path / "sweep")}
    assert jobs == {"optim.lr=-1": "", "optim.lr=-2": "", "seed=0": "0"}


def test_an_interrupted_sweep_has_its_table_too(
    sweep: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = verb.train

    def interrupted(config: Any, console: Any) -> Any:
        if config.seed == 1:
            raise KeyboardInterrupt
        return train(config, console)

    monkeypatch.setattr(verb, "train", interrupted)
    assert sweep("seed=0,1,2").status == 130
    statuses = {row["seed"]: row["status"] for row in table(tmp_path / "sweep")}
    assert statuses == {"0": "done", "1": "unfinished"}


def test_sigterm_ends_the_sweep_and_not_the_job_alone(
    sweep: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(arguments: Any, console: Any) -> Any:
        raise Stopped("stopped by SIGTERM")

    monkeypatch.setattr(verb, "train", stopped)
    outcome = sweep("seed=0,1")
    assert (outcome.status, outcome.err) == (75, "tokengrow train: stopped by SIGTERM\n")
    assert [row["status"] for row in table(tmp_path / "sweep")] == ["unfinished"]


# Refused before anything is written


@pytest.fixture
def refused(sweep: Command, tmp_path: Path) -> Command:
    """`refused(*overrides)`: asserts how a sweep that cannot begin ends; gives the sentence."""

    def call(*words: str) -> str:
        outcome = sweep(*words)
        assert outcome.status == 2, outcome.out
        assert len(outcome.err.splitlines()) == 1, outcome.err
        assert not (tmp_path / "sweep").exists()
        return str(outcome.err)

    return call


def test_a_sweep_over_an_unknown_key_leaves_nothing(refused: Command) -> None:
    assert "Unknown key optim.lrr. Did you mean 'optim.lr'?" in refused("optim.lrr=1,2")


def test_a_sweep_does_not_mix_with_a_run(sweep: Command, source: Path) -> None:
    run = source.parent
    before = sorted(run.rglob("*"))
    outcome = sweep("seed=0,1", f"out={run}")
    assert (outcome.status, outcome.err) == (
        2,
        f"tokengrow train: out={run} holds a run. Choose another out= for the sweep.\n",
    )
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize(
    "asked",
    [
        "fabric.devices=2",
        "fabric.devices=1,2",
        "fabric.num_nodes=2",
        "fabric.strategy=fsdp2",
    ],
)
def test_jobs_on_several_devices_are_refused(refused: Command, asked: str) -> None:
    # Lightning would start the second process with this command line, and it would sweep again.
    said = refused("seed=0,1", asked)
    value = asked.replace("1,", "")
    assert f"A job of a sweep must be one process on one device, got {value}" in said
    assert said.endswith(
        ". Set fabric=single, start the runs from a shell loop, or let Slurm start the processes "
        "of each job (docs/sweeps.md).\n"
    )


def test_a_job_on_several_devices_is_refused_where_its_recipe_asks_for_them(
    sweep: Command, tmp_path: Path
) -> None:
    assert sweep("fabric=single,ddp").status == 1
    done, failed = table(tmp_path / "sweep")
    assert (done["fabric"], failed["fabric"]) == ("single", "ddp")
    assert failed["error"].startswith(
        "A job of a sweep must be one process on one device, got fabric.strategy=ddp"
    )


@pytest.mark.parametrize(
    "started",
    [
        {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "NODE_RANK": "0"},  # by Lightning itself
        {
            "TORCHELASTIC_RUN_ID": "x",
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "RANK": "1",
            "LOCAL_RANK": "1",
        },
        {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_PROCID": "1"},
    ],
    ids=["Lightning", "torchrun", "srun"],
)
def test_a_process_among_others_does_not_sweep(
    refused: Command, started: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    assert (
        "--multirun must be started in one process, got 2, each of which would run the entire "
        "sweep. Start it without torchrun, srun or fabric run."
    ) in refused("seed=0,1")


def test_tasks_of_a_job_are_for_slurm(refused: Command) -> None:
    asked = "hydra.launcher.tasks_per_node=2"
    assert asked in refused("seed=0,1", "hydra/launcher=submitit_local", asked)


def test_slurm_is_asked_for_as_many_processes_as_a_job_has_devices(refused: Command) -> None:
    said = refused("seed=0,1", "hydra/launcher=submitit_slurm", "fabric.devices=4")
    assert said == (
        "tokengrow train: hydra.launcher.tasks_per_node must be 4, the value of fabric.devices, "
        "got 1. Change one of them.\n"
    )


@pytest.mark.parametrize(
    ("group", "choice"),
    [("hydra/launcher", "joblib"), ("hydra/sweeper", "optuna")],
)
def test_a_plugin_that_is_not_there_is_an_extra(group: str, choice: str) -> None:
    error = MissingConfigException("", f"{group}/{choice}", ["basic"])
    assert error_message("train", error) == (
        f"{group}={choice} needs an extra: pip install 'tokengrow[sweep]'."
    )


# Names of folders, and what the table shows of a setting


def test_a_folder_is_named_after_what_its_job_sets() -> None:
    settings = {"optim.lr": "0.0003", "store": "/data/a b", "model.tokens": "{ffn: 8}"}
    name = folder_name(settings)
    assert name.startswith("optim.lr=0.0003,store=_data_a_b,model.tokens=_ffn__8_-")
    assert name != folder_name(settings | {"store": "/data_a b"}), "a hash tells them apart"


def test_a_nested_group_goes_by_its_last_word_unless_another_has_the_same() -> None:
    assert short_groups({"recipes/study/tiny/arm": "grown", "seed": "0"}) == {
        "arm": "grown",
        "seed": "0",
    }
    same = {"recipes/a/arm": "grown", "recipes/b/arm": "small"}
    assert short_groups(same) == same


def test_long_names_are_cut_and_stay_different() -> None:
    names = {folder_name({"store": "x" * 300 + end}) for end in "ab"}
    assert len(names) == 2
    assert all(len(name) < 140 for name in names)


@pytest.mark.parametrize(
    ("setting", "shown"),
    [("0.0003", "0.0003"), ("0.003688821332197714", "0.003689"), ("quickstart", "quickstart")],
)
def test_a_number_that_a_sampler_drew_is_shown_with_four_digits(setting: str, shown: str) -> None:
    row = Row(folder="x", settings={"optim.lr": setting}, job=0, sweep=0)
    assert list(sweep_table([row]).columns[1].cells) == [shown]
