"""A run is the same whatever the number of its processes, and however it is spread over them.

All of them train the same ladder of two sizes, of which the second one's rows (13) do not share out
evenly. They differ by the order in which float32 numbers are added, and by nothing else.
"""

import csv
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from ranks import train_together
from torch import Tensor

from tokengrow.checkpoint.layout import find_checkpoints, step_of
from tokengrow.checkpoint.store import Checkpoint, load_checkpoint
from tokengrow.data.corpus import TextCorpus
from tokengrow.data.store import TokenStore, build_store
from tokengrow.data.tokenizer import TokenizerConfig, train_tokenizer
from tokengrow.distributed.fabric import FabricConfig
from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.moments import ROW_AGE
from tokengrow.metrics.run_log import LoggerConfig
from tokengrow.training.config import TrainConfig
from tokengrow.training.trainer import fit

pytestmark = pytest.mark.dist

ROUNDING = 1e-5
"""Largest difference of a tensor's entries, over the largest entry."""

ALONE = FabricConfig(accelerator="cpu", precision="32-true")
DDP = replace(ALONE, strategy="ddp")
FSDP2 = replace(ALONE, strategy="fsdp2")
SPREADS = {
    "ddp": DDP,
    "ddp-zero1": replace(DDP, zero1=True),
    "fsdp2": FSDP2,
    "fsdp2-block": replace(FSDP2, activation_checkpointing="block"),
    "fsdp2-selective": replace(FSDP2, activation_checkpointing="selective"),
}

TRANSFORMER_SPREADS = ("ddp-zero1", "fsdp2", "fsdp2-selective")

LEFT_AT = {3: "in the middle of a stage", 6: "before a growth", 8: "while new entries warm up"}
BFLOAT16 = {"precision": "bf16-mixed"}


@dataclass(frozen=True)
class Runs:
    """Folders of runs that have ended, by name."""

    folder: Path

    def last(self, name: str) -> Checkpoint:
        """Where a run ended."""
        return load_checkpoint(self.folder / name)

    def losses(self, name: str) -> list[float]:
        """Training losses of all updates, as they were logged."""
        with (self.folder / name / "logs" / "version_0" / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        return [float(row["train/loss"]) for row in rows if row["train/loss"]]


@pytest.fixture(scope="module")
def other_store(corpus: TextCorpus, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """The corpus in tokens of another vocabulary."""
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
    """The ladder in one process, in two and in four; each lot of processes starts once."""
    folder = tmp_path_factory.mktemp("runs")

    def ladder(name: str, fabric: FabricConfig, **changes: Any) -> TrainConfig:
        sizes = {"rungs": (8, 13), "micro_batch_size": 2, "checkpoint_every": 10}
        return tiny_run(folder / name, fabric=fabric, **sizes | changes)

    def resumed(name: str, left: str, step: int, fabric: FabricConfig) -> TrainConfig:
        leave(folder / left, folder / name, step)
        return ladder(name, fabric)

    def frozen(name: str, fabric: FabricConfig) -> TrainConfig:
        run = ladder(name, fabric, growth=GrowthConfig(freeze_source=3))
        # Clipped at every update, so that a gradient of what is frozen would shorten the others.
        clipped = [replace(each, optim=replace(each.optim, grad_clip=0.1)) for each in run.stages]
        return replace(run, stages=tuple(clipped))

    def fifty(name: str, fabric: FabricConfig, micro: int) -> TrainConfig:
        sizes = {"steps": 25, "batch_size": 8, "micro_batch_size": micro, "validation_every": 25}
        return ladder(name, fabric, log_every=1, logger=LoggerConfig(), **sizes)

    def transformer(name: str, fabric: FabricConfig) -> TrainConfig:
        run = transformer_run(folder / name, fabric=fabric, micro_batch_size=2)
        # Where keys are not rotated, or too slowly, their bias moves no weight of attention: its
        # gradient is rounding alone, of which Adam makes whole steps.
        (only,) = run.stages
        rotated = replace(only.model, rotary_channels=only.model.head_dim, rotary_base=10.0)
        return replace(run, stages=(replace(only, model=rotated),))

    each_step = {"checkpoint_every": 1, "keep_checkpoints": 20}
    fit(ladder("alone", ALONE, **each_step), store)
    fit(frozen("alone-frozen", ALONE), store)
    fit(ladder("alone-bfloat16", replace(ALONE, **BFLOAT16)), store)
    fit(fifty("1x8", ALONE, micro=8), store)
    fit(transformer("alone-transformer", ALONE), store)
    fit(transformer("alone-bfloat16-transformer", replace(ALONE, **BFLOAT16)), store)
    spread = [
        ladder(name, fabric, **each_step if name == "fsdp2" else {})
        for name, fabric in SPREADS.items()
    ]
    spread += [frozen(f"{name}-frozen", SPREADS[name]) for name in ("ddp-zero1", "fsdp2")]
    onto_two = [resumed(f"fsdp2-from-{step}", "alone", step, FSDP2) for step in LEFT_AT]
    narrow = [ladder("fsdp2-bfloat16", replace(FSDP2, **BFLOAT16))]
    narrow += [transformer("fsdp2-bfloat16-transformer", replace(FSDP2, **BFLOAT16))]
    linear = [transformer(f"{name}-transformer", SPREADS[name]) for name in TRANSFORMER_SPREADS]
    (folder / "taken").mkdir()
    (folder / "taken" / "cat.png").write_bytes(b"cat")
    refused = [
        ladder("uneven", DDP, micro_batch_size=4),
        ladder("taken", DDP),
        ladder("homeless", DDP, source=str(folder / "nowhere")),
    ]
    two = [*spread, *onto_two, *narrow, *linear, fifty("2x4", DDP, 4), *refused]
    four = [fifty("4x2", DDP, 2), fifty("4x2-fsdp2", FSDP2, 2)]
    one_data, two_data = (store, store), (store, other_store)
    tasks = [*((each, one_data) for each in two), (ladder("two-data", DDP), two_data)]
    train_together(2, folder, tasks)
    train_together(4, folder, [(each, one_data) for each in four])
    for step in LEFT_AT:
        fit(resumed(f"ddp-from-{step}", "fsdp2", step, DDP), store)
    return Runs(folder)


def leave(run: Path, copy: Path, step: int) -> None:
    """A copy of a run as it lay there when the checkpoint of a step had just been written."""
    shutil.copytree(run, copy)
    for folder in find_checkpoints(copy):
        if step_of(folder) > step:
            shutil.rmtree(folder)


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    """Asserts that two runs ended alike: counters, losses, weights and optimizer state."""
    for counter in ("fingerprint", "next_batch", "step", "stage_step", "tokens", "stage_ends"):
        assert getattr(one.train_state, counter) == getattr(other.train_state, counter), counter
    losses = [[row.loss for row in each.train_state.validation] for each in (one, other)]
    assert losses[0] == pytest.approx(losses[1], abs=ROUNDING)
    assert one.config == other.config
    assert_close(dict(one.weights), dict(other.weights))
    assert_close(dict(one.optimizer), dict(other.optimizer))


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        difference = (found[name] - tensor).abs().max()
        assert difference <= ROUNDING * tensor.abs().max(), name


# However it is spread


@pytest.mark.parametrize("spread", SPREADS)
def test_two_processes_end_as_one_does(runs: Runs, spread: str) -> None:
    assert_same(runs.last(spread), runs.last("alone"))


@pytest.mark.parametrize("spread", ["ddp-zero1", "fsdp2"])
def test_two_processes_freeze_what_one_freezes(runs: Runs, spread: str) -> None:
    assert_same(runs.last(f"{spread}-frozen"), runs.last("alone-frozen"))


@pytest.mark.parametrize("spread", TRANSFORMER_SPREADS)
def test_two_processes_train_a_transformer_as_one_does(runs: Runs, spread: str) -> None:
    assert_same(runs.last(f"{spread}-transformer"), runs.last("alone-transformer"))


@pytest.mark.parametrize("model", ["", "-transformer"], ids=["tokenformer", "transformer"])
def test_weights_sent_in_bfloat16_train_as_autocast_does(runs: Runs, model: str) -> None:
    losses = [
        [row.loss for row in runs.last(f"{name}{model}").train_state.validation]
        for name in ("fsdp2-bfloat16", "alone-bfloat16")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)


# However many there are


@pytest.mark.parametrize("processes", ["2x4", "4x2", "4x2-fsdp2"])
def test_fifty_losses_do_not_depend_on_processes_and_micro_batches(
    runs: Runs, processes: str
) -> None:
    found, wanted = runs.losses(processes), runs.losses("1x8")
    assert len(found) == 50
    assert found == pytest.approx(wanted, abs=ROUNDING)


# However many there were


@pytest.mark.parametrize("step", LEFT_AT, ids=LEFT_AT.values())
def test_left_by_one_process_two_go_on_at_the_same_batch_with_the_same_optimizer(
    runs: Runs, step: int
) -> None:
    assert_same(runs.last(f"fsdp2-from-{step}"), runs.last("alone"))


@pytest.mark.parametrize("step", LEFT_AT, ids=LEFT_AT.values())
def test_left_by_two_processes_one_goes_on_at_the_same_batch_with_the_same_optimizer(
    runs: Runs, step: int
) -> None:
    assert_same(runs.last(f"ddp-from-{step}"), runs.last("alone"))


def test_a_run_is_left_while_entries_of_several_ages_are_updated(runs: Runs) -> None:
    left = find_checkpoints(runs.folder / "fsdp2")
    (while_warming_up,) = [folder for folder in left if step_of(folder) == 8]
    state = load_checkpoint(while_warming_up).optimizer
    ages = state[f"{ROW_AGE}.blocks.0.ffn.key_param_tokens"]
    assert sorted(set(ages.tolist())) == [2.0, 8.0]


# However wrong the input


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("uneven", "batch_size (4) is not a multiple of micro_batch_size x processes (4 x 2)"),
        ("taken", "holds something that is not a run: choose another out="),
        ("homeless", "nowhere does not exist"),
        ("two-data", "rank 1 has other tokens than rank 0: make them once, with `tokengrow data`"),
    ],
)
def test_a_wrong_input_is_told_on_every_rank_and_nothing_is_written(
    runs: Runs, name: str, said: str
) -> None:
    told = {(runs.folder / f"{name}.refused-{rank}").read_text() for rank in (0, 1)}
    assert len(told) == 1
    assert said in told.pop()
    left = [path.name for path in (runs.folder / name).glob("*")]
    assert left == (["cat.png"] if name == "taken" else [])
