"""Launch detection from the environment, and conflicts between a launcher and the config."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tokengrow.cli.train import apply_launch_options
from tokengrow.distributed.fabric import FabricConfig, build_fabric
from tokengrow.distributed.launch import (
    CLUSTER_GUIDE,
    Launch,
    detect_launch,
    fabric_run_options,
    rank_from_env,
)
from tokengrow.errors import UserError

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "RANK": "3",
    "LOCAL_RANK": "1",
}
BATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "ladder", "SLURM_NTASKS": "4"}
SRUN = BATCH_SCRIPT | {"SLURM_STEP_ID": "0", "SLURM_NNODES": "2", "SLURM_PROCID": "3"}
INTERACTIVE = SRUN | {"SLURM_JOB_NAME": "bash", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}

SetEnvironment = Callable[[dict[str, str]], None]


@pytest.fixture
def set_environment(monkeypatch: pytest.MonkeyPatch) -> SetEnvironment:
    """`set_environment(variables)`: set the variables of a launcher, and unset all others."""
    for name in (*TORCHRUN, *SRUN):
        monkeypatch.delenv(name, raising=False)

    def set_variables(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


# Detection


@pytest.mark.parametrize(
    ("variables", "launch", "rank"),
    [
        ({}, None, 0),
        ({"LOCAL_RANK": "1"}, None, 1),  # a child of Fabric, with the same command line
        (TORCHRUN, Launch("torchrun", devices=2, num_nodes=2), 3),
        (SRUN, Launch("srun", devices=2, num_nodes=2), 3),
        (BATCH_SCRIPT, None, 0),
        (INTERACTIVE, None, 0),
        (INTERACTIVE | {"LOCAL_RANK": "1"}, None, 1),
        (INTERACTIVE | TORCHRUN, Launch("torchrun", devices=2, num_nodes=2), 3),
    ],
    ids=[
        *("none", "fabric", "torchrun", "srun", "sbatch"),
        *("interactive", "interactive-fabric", "interactive-torchrun"),
    ],
)
def test_launch_and_rank_are_detected(
    set_environment: SetEnvironment, variables: dict[str, str], launch: Launch | None, rank: int
) -> None:
    set_environment(variables)
    assert (detect_launch(), rank_from_env()) == (launch, rank)


@pytest.mark.parametrize(
    "variables",
    [TORCHRUN | {"WORLD_SIZE": "5"}, SRUN | {"SLURM_NTASKS": "5"}],
    ids=["torchrun", "srun"],
)
def test_unequal_processes_per_node_are_an_error(
    set_environment: SetEnvironment, variables: dict[str, str]
) -> None:
    set_environment(variables)
    message = "Every node must have the same number of processes, got 5 processes on 2 nodes"
    with pytest.raises(UserError, match=message):
        detect_launch()


# Conflicts with the config


@pytest.mark.parametrize(
    ("variables", "config", "message"),
    [
        (
            TORCHRUN,
            {"devices": 4},
            "devices must be 2, because torchrun started 2 processes on each node, got 4",
        ),
        (
            TORCHRUN,
            {"num_nodes": 1},
            "num_nodes must be 2, because torchrun started 2 nodes, got 1",
        ),
        (SRUN, {"num_nodes": 4}, "num_nodes must be 2, because srun started 2 nodes, got 4"),
        ({}, {"num_nodes": 2}, "num_nodes must be 1 without a launcher, got 2"),
        (BATCH_SCRIPT, {"num_nodes": 2}, "num_nodes must be 1 without a launcher, got 2"),
    ],
    ids=["torchrun-devices", "torchrun-nodes", "srun-nodes", "none", "sbatch"],
)
def test_config_that_contradicts_the_launcher_is_an_error(
    set_environment: SetEnvironment,
    variables: dict[str, str],
    config: dict[str, int],
    message: str,
) -> None:
    set_environment(variables)
    with pytest.raises(UserError, match=rf"fabric\.{message}.*{CLUSTER_GUIDE}"):
        build_fabric(FabricConfig(accelerator="cpu", **config))


@pytest.mark.parametrize("variables", [BATCH_SCRIPT, INTERACTIVE], ids=["sbatch", "interactive"])
def test_slurm_job_without_srun_runs_one_process(
    set_environment: SetEnvironment, variables: dict[str, str]
) -> None:
    set_environment(variables)
    assert build_fabric(FabricConfig(accelerator="cpu")).world_size == 1


def test_installed_srun_is_not_required(
    set_environment: SetEnvironment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    set_environment({})
    (tmp_path / "srun").touch(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert build_fabric(FabricConfig(accelerator="cpu")).world_size == 1  # without a warning


# fabric run


def test_fabric_run_options_leave_the_environment(set_environment: SetEnvironment) -> None:
    options = {"ACCELERATOR": "gpu", "STRATEGY": "ddp", "DEVICES": "2", "NUM_NODES": "1"}
    variables = {f"LT_{key}": value for key, value in options.items()}
    set_environment({"LT_CLI_USED": "1"} | variables)
    assert fabric_run_options() == {"accelerator": "cuda", "strategy": "ddp"}
    assert fabric_run_options() == {}


def test_fabric_run_options_replace_auto() -> None:
    section = {"accelerator": "cpu", "strategy": "auto", "precision": "auto"}
    assert apply_launch_options(section, {"strategy": "ddp"}) == section | {"strategy": "ddp"}


def test_fabric_run_that_contradicts_the_config_is_an_error() -> None:
    message = r"fabric\.strategy must be auto or ddp, as given to `fabric run`, got fsdp2"
    with pytest.raises(UserError, match=message):
        apply_launch_options({"strategy": "fsdp2"}, {"strategy": "ddp"})
