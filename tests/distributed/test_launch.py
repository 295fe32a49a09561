"""What started a process, as its environment says it, and what then does not fit the config."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tokengrow.cli.train import apply_launch_options
from tokengrow.distributed import launch
from tokengrow.distributed.fabric import FabricConfig, build_fabric
from tokengrow.distributed.launch import Launch, fabric_run_options, find_launch, process_rank
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
AT_A_PROMPT = SRUN | {"SLURM_JOB_NAME": "bash", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}

Environment = Callable[[dict[str, str]], None]


@pytest.fixture
def started_with(monkeypatch: pytest.MonkeyPatch) -> Environment:
    """`started_with(variables)`: the environment of a process that a launcher starts."""
    for name in (*TORCHRUN, *SRUN):
        monkeypatch.delenv(name, raising=False)

    def set_them(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_them


# Who it was


@pytest.mark.parametrize(
    ("variables", "found", "rank"),
    [
        ({}, None, 0),
        ({"LOCAL_RANK": "1"}, None, 1),  # Fabric's own child: its command line says the rest
        (TORCHRUN, Launch("torchrun", devices=2, num_nodes=2), 3),
        (SRUN, Launch("srun", devices=2, num_nodes=2), 3),
        (BATCH_SCRIPT, None, 0),
        (AT_A_PROMPT, None, 0),
        (AT_A_PROMPT | {"LOCAL_RANK": "1"}, None, 1),
        (AT_A_PROMPT | TORCHRUN, Launch("torchrun", devices=2, num_nodes=2), 3),
    ],
    ids=["nobody", "fabric", "torchrun", "srun", "sbatch", "prompt", "prompt-fabric", "prompt-run"],
)
def test_the_launcher_and_the_rank_are_found(
    started_with: Environment, variables: dict[str, str], found: Launch | None, rank: int
) -> None:
    started_with(variables)
    assert (find_launch(), process_rank()) == (found, rank)


@pytest.mark.parametrize(
    "variables", [TORCHRUN | {"WORLD_SIZE": "5"}, SRUN | {"SLURM_NTASKS": "5"}], ids=["run", "srun"]
)
def test_nodes_that_have_not_as_many_processes_each_are_refused(
    started_with: Environment, variables: dict[str, str]
) -> None:
    started_with(variables)
    with pytest.raises(UserError, match="5 processes on 2 nodes are not as many on each"):
        find_launch()


# What does not fit it


@pytest.mark.parametrize(
    ("variables", "config", "said"),
    [
        (TORCHRUN, {"devices": 4}, "devices=4, but torchrun started 2 processes on each node"),
        (TORCHRUN, {"num_nodes": 1}, "num_nodes=1, but torchrun started 2 nodes"),
        (SRUN, {"num_nodes": 4}, "num_nodes=4, but srun started 2 nodes"),
        ({}, {"num_nodes": 2}, "num_nodes=2, and nothing has started this process on several"),
        (BATCH_SCRIPT, {"num_nodes": 2}, "num_nodes=2, and nothing has started this process"),
    ],
)
def test_a_config_of_other_processes_than_were_started_is_refused(
    started_with: Environment, variables: dict[str, str], config: dict[str, int], said: str
) -> None:
    started_with(variables)
    with pytest.raises(UserError, match=rf"fabric\.{said}.*{launch.GUIDE}"):
        build_fabric(FabricConfig(accelerator="cpu", **config))


@pytest.mark.parametrize("variables", [BATCH_SCRIPT, AT_A_PROMPT], ids=["sbatch", "prompt"])
def test_in_a_job_a_process_that_srun_has_not_started_waits_for_no_other(
    started_with: Environment, variables: dict[str, str]
) -> None:
    started_with(variables)
    assert build_fabric(FabricConfig(accelerator="cpu")).world_size == 1


def test_where_there_is_slurm_one_may_train_without_it(
    started_with: Environment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started_with({})
    (tmp_path / "srun").touch(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert build_fabric(FabricConfig(accelerator="cpu")).world_size == 1  # and nothing is said


# fabric run


def test_what_fabric_run_was_given_is_taken_out_of_the_environment(
    started_with: Environment,
) -> None:
    given = {"ACCELERATOR": "gpu", "STRATEGY": "ddp", "DEVICES": "2", "NUM_NODES": "1"}
    started_with({"LT_CLI_USED": "1"} | {f"LT_{key}": value for key, value in given.items()})
    assert fabric_run_options() == {"accelerator": "cuda", "strategy": "ddp"}
    assert fabric_run_options() == {}


def test_what_fabric_run_was_given_stands_where_the_config_says_auto() -> None:
    section = {"accelerator": "cpu", "strategy": "auto", "precision": "auto"}
    assert apply_launch_options(section, {"strategy": "ddp"}) == section | {"strategy": "ddp"}


def test_fabric_run_and_the_config_must_agree() -> None:
    with pytest.raises(UserError, match=r"fabric\.strategy=fsdp2, and `fabric run` was given ddp"):
        apply_launch_options({"strategy": "fsdp2"}, {"strategy": "ddp"})
