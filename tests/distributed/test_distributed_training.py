"""Independence of a run from the number of its processes and from the parallel strategy.

All runs train the same ladder of two sizes. The rows (13) of the second one do not divide evenly
among the ranks. Runs differ only by the order in which float32 numbers are added.
"""

import csv
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from launchers import train_distributed
from torch import Tensor

from tokengrow.checkpoint.layout import find_checkpoints, step_of
from tokengrow.checkpoint.store import Checkpoint, load_checkpoint
from tokengrow.data.corpus import TextCorpus
from tokengrow.data.store import TokenStore, build_store
from tokengrow.data.tokenizer import TokenizerConfig, train_tokenizer
from tokengrow.distributed.fabric import FabricConfig
from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.moments import ROW_AGE
from tokengrow.metrics.logger_collection import LoggerConfig
from tokengrow.training.config import TrainConfig
from tokengrow.training.trainer import fit

pytestmark = pytest.mark.dist

ROUNDING = 1e-5
"""Largest difference of a tensor's entries, over the largest entry."""

SINGLE = FabricConfig(accelerator="cpu", precision="32-true")
DDP = replace(SINGLE, strategy="ddp")
FSDP2 = replace(SINGLE, strategy="fsdp2")
STRATEGIES = {
    "ddp": DDP,
    "ddp-zero1": replace(DDP, zero1=True),
    "fsdp2": FSDP2,
    "fsdp2-block": replace(FSDP2, activation_checkpointing="block"),
    "fsdp2-selective": replace(FSDP2, activation_checkpointing="selective"),
}

TRANSFORMER_STRATEGIES = ("ddp-zero1", "fsdp2", "fsdp2-selective")

STOP_STEPS = {3: "mid-stage", 6: "before-growth", 8: "warm-up-of-new-entries"}
"""Step of the checkpoint that a run is resumed from, and its position in the ladder."""

BFLOAT16 = {"precision": "bf16-mixed"}


@dataclass(frozen=True)
class Runs:
    """Finished runs."""

    folder: Path
    """Directory of the run directories."""

    def last(self, name: str) -> Checkpoint:
        """Return the last checkpoint of a run."""
        return load_checkpoint(self.folder / name)

    def losses(self, name: str) -> list[float]:
        """Return the logged training loss of each update of a run."""
        with (self.folder / name / "logs" / "version_0" / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        return [float(row["train/loss"]) for row in rows if row["train/loss"]]


@pytest.fixture(scope="module")
def other_store(corpus: TextCorpus, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Tokens of the same corpus with another vocabulary."""
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=500), corpus)
    return build_store(corpus, tokenizer, tmp_path_factory.mktemp("other") / "s", progress=False)


@pytest.fixture(scope="module")
def runs(
    tiny_run: Callable[..., TrainConfig],
    transformer_run: Callable[..., TrainConfig],
    store: TokenStore,
    other_store: TokenStore,
    tmp_path_factory: pytest.TempPathFactory,
) -> Runs:
    """Train the ladder in one, two and four processes, which start once for all runs of a count."""
    folder = tmp_path_factory.mktemp("runs")

    def ladder(name: str, fabric: FabricConfig, **changes: Any) -> TrainConfig:
        settings = {"rungs": (8, 13), "micro_batch_size": 2, "checkpoint_every": 10}
        return tiny_run(folder / name, fabric=fabric, **settings | changes)

    def resumed(name: str, source: str, step: int, fabric: FabricConfig) -> TrainConfig:
        copy_run(folder / source, folder / name, step)
        return ladder(name, fabric)

    def frozen(name: str, fabric: FabricConfig) -> TrainConfig:
        run = ladder(name, fabric, growth=GrowthConfig(freeze_source=3))
        # Clipped at every update, so that a gradient of a frozen entry would scale the others down.
        clipped = [replace(each, optim=replace(each.optim, grad_clip=0.1)) for each in run.stages]
        return replace(run, stages=tuple(clipped))

    def fifty_steps(name: str, fabric: FabricConfig, micro: int) -> TrainConfig:
        settings = {"steps": 25, "batch_size": 8, "micro_batch_size": micro, "validation_every": 25}
        return ladder(name, fabric, log_every=1, logger=LoggerConfig(), **settings)

    def transformer(name: str, fabric: FabricConfig) -> TrainConfig:
        run = transformer_run(folder / name, fabric=fabric, micro_batch_size=2)
        # If keys are not rotated, or too slowly, their bias does not change any attention weight.
        # Its gradient is rounding only, and Adam turns it into updates of full size.
        (only,) = run.stages
        rotated = replace(only.model, rotary_channels=only.model.head_dim, rotary_base=10.0)
        return replace(run, stages=(replace(only, model=rotated),))

    each_step = {"checkpoint_every": 1, "keep_checkpoints": 20}
    fit(ladder("single", SINGLE, **each_step), store)
    fit(frozen("single-frozen", SINGLE), store)
    fit(ladder("single-bfloat16", replace(SINGLE, **BFLOAT16)), store)
    fit(fifty_steps("1x8", SINGLE, micro=8), store)
    fit(transformer("single-transformer", SINGLE), store)
    fit(transformer("single-bfloat16-transformer", replace(SINGLE, **BFLOAT16)), store)

    (folder / "occupied").mkdir()
    (folder / "occupied" / "cat.png").write_bytes(b"cat")
    two_processes = [
        *(
            ladder(name, fabric, **each_step if name == "fsdp2" else {})
            for name, fabric in STRATEGIES.items()
        ),
        *(frozen(f"{name}-frozen", STRATEGIES[name]) for name in ("ddp-zero1", "fsdp2")),
        *(resumed(f"fsdp2-from-{step}", "single", step, FSDP2) for step in STOP_STEPS),
        ladder("fsdp2-bfloat16", replace(FSDP2, **BFLOAT16)),
        transformer("fsdp2-bfloat16-transformer", replace(FSDP2, **BFLOAT16)),
        *(transformer(f"{name}-transformer", STRATEGIES[name]) for name in TRANSFORMER_STRATEGIES),
        fifty_steps("2x4", DDP, 4),
        # Refused
        ladder("uneven", DDP, micro_batch_size=4),
        ladder("occupied", DDP),
        ladder("no-source", DDP, source=str(folder / "nowhere")),
    ]
    four_processes = [fifty_steps("4x2", DDP, 2), fifty_steps("4x2-fsdp2", FSDP2, 2)]
    different_tokens = (ladder("different-tokens", DDP), (store, other_store))
    tasks = [*((each, (store, store)) for each in two_processes), different_tokens]
    train_distributed(2, folder, tasks)
    train_distributed(4, folder, [(each, (store, store)) for each in four_processes])
    for step in STOP_STEPS:
        fit(resumed(f"ddp-from-{step}", "fsdp2", step, DDP), store)
    return Runs(folder)


def copy_run(run: Path, copy: Path, step: int) -> None:
    """Copy a run as it was right after the checkpoint of a step."""
    shutil.copytree(run, copy)
    for folder in find_checkpoints(copy):
        if step_of(folder) > step:
            shutil.rmtree(folder)


def assert_equal_runs(actual: Checkpoint, expected: Checkpoint) -> None:
    """Assert that two runs ended with equal counters, losses, weights and optimizer states."""
    for counter in ("fingerprint", "next_batch", "step", "stage_step", "tokens", "stage_ends"):
        one, other = getattr(actual.train_state, counter), getattr(expected.train_state, counter)
        assert one == other, counter
    assert validation_losses(actual) == pytest.approx(validation_losses(expected), abs=ROUNDING)
    assert actual.config == expected.config
    assert_close(dict(actual.weights), dict(expected.weights))
    assert_close(dict(actual.optimizer), dict(expected.optimizer))


def validation_losses(checkpoint: Checkpoint) -> list[float]:
    return [row.loss for row in checkpoint.train_state.validation]


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert that all tensors are equal up to `ROUNDING`."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        difference = (actual[name] - tensor).abs().max()
        assert difference <= ROUNDING * tensor.abs().max(), name


# Strategies


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_as_one(runs: Runs, strategy: str) -> None:
    assert_equal_runs(runs.last(strategy), runs.last("single"))


@pytest.mark.parametrize("strategy", ["ddp-zero1", "fsdp2"])
def test_two_processes_freeze_entries_as_one(runs: Runs, strategy: str) -> None:
    assert_equal_runs(runs.last(f"{strategy}-frozen"), runs.last("single-frozen"))


@pytest.mark.parametrize("strategy", TRANSFORMER_STRATEGIES)
def test_two_processes_train_a_transformer_as_one(runs: Runs, strategy: str) -> None:
    assert_equal_runs(runs.last(f"{strategy}-transformer"), runs.last("single-transformer"))


@pytest.mark.parametrize("model", ["", "-transformer"], ids=["tokenformer", "transformer"])
def test_fsdp2_in_bfloat16_trains_as_autocast(runs: Runs, model: str) -> None:
    actual = validation_losses(runs.last(f"fsdp2-bfloat16{model}"))
    expected = validation_losses(runs.last(f"single-bfloat16{model}"))
    assert actual == pytest.approx(expected, abs=2e-3)


# Number of processes


@pytest.mark.parametrize("processes", ["2x4", "4x2", "4x2-fsdp2"])
def test_fifty_losses_do_not_depend_on_process_count(runs: Runs, processes: str) -> None:
    losses = runs.losses(processes)
    assert len(losses) == 50
    assert losses == pytest.approx(runs.losses("1x8"), abs=ROUNDING)


# Number of processes before resuming


@pytest.mark.parametrize("step", STOP_STEPS, ids=STOP_STEPS.values())
def test_two_processes_resume_a_run_of_one(runs: Runs, step: int) -> None:
    assert_equal_runs(runs.last(f"fsdp2-from-{step}"), runs.last("single"))


@pytest.mark.parametrize("step", STOP_STEPS, ids=STOP_STEPS.values())
def test_one_process_resumes_a_run_of_two(runs: Runs, step: int) -> None:
    assert_equal_runs(runs.last(f"ddp-from-{step}"), runs.last("single"))


def test_checkpoint_during_warm_up_has_entries_of_two_ages(runs: Runs) -> None:
    folders = find_checkpoints(runs.folder / "fsdp2")
    (during_warm_up,) = [folder for folder in folders if step_of(folder) == 8]
    state = load_checkpoint(during_warm_up).optimizer
    ages = state[f"{ROW_AGE}.blocks.0.ffn.key_param_tokens"]
    assert sorted(set(ages.tolist())) == [2.0, 8.0]


# Wrong input


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("uneven", "batch_size must be a multiple of micro_batch_size x processes (4 x 2), got 4"),
        ("occupied", "holds files that are not a run. Choose another out="),
        ("no-source", "nowhere does not exist"),
        (
            "different-tokens",
            "Rank 1 must have the same tokens as rank 0. Make them once with `tokengrow data`",
        ),
    ],
)
def test_wrong_input_is_an_error_on_every_rank(runs: Runs, name: str, message: str) -> None:
    messages = {(runs.folder / f"{name}.refused-{rank}").read_text() for rank in (0, 1)}
    assert len(messages) == 1
    assert message in messages.pop()
    written = [path.name for path in (runs.folder / name).glob("*")]
    assert written == (["cat.png"] if name == "occupied" else [])
