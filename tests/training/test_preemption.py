"""SIGTERM and Ctrl-C: saved state, messages, and resuming with the same command."""

import io
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from killed import same_bits
from rich.console import Console
from victim import Watched

from tokengrow.checkpoint.layout import find_checkpoints
from tokengrow.checkpoint.store import Checkpoint
from tokengrow.cli import runner
from tokengrow.data.store import TokenStore
from tokengrow.errors import Stopped
from tokengrow.training import checkpoint_writer
from tokengrow.training.config import TrainConfig
from tokengrow.training.preemption import StopRequest
from tokengrow.training.trainer import FitResult, Trainer, fit

Runs = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def whole(tiny_run: Runs, store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A ladder of two rungs of six updates each, in one go; not to be written to."""
    return fit(tiny_run(tmp_path_factory.mktemp("whole") / "run", rungs=(8, 12)), store)


@pytest.fixture
def run(tiny_run: Runs, tmp_path: Path) -> TrainConfig:
    """The same ladder, elsewhere: it saves every fourth update and logs every second one."""
    return tiny_run(tmp_path / "run", rungs=(8, 12))


class Wire(io.StringIO):
    """A place to print to that sends a signal to the process once some words come by."""

    def __init__(self, words: str, number: int) -> None:
        super().__init__()
        self._words, self._number = words, number

    def write(self, text: str) -> int:
        if self._words in text:
            os.kill(os.getpid(), self._number)
        return super().write(text)


def sent_at(words: str, number: int = signal.SIGTERM) -> Console:
    return Console(file=Wire(words, number), width=200)


def stopped(run: TrainConfig, store: TokenStore, console: Console | None = None) -> str:
    """Assert that a run stops on SIGTERM; return its message."""
    with pytest.raises(Stopped) as said:
        fit(run, store, console)
    return str(said.value)


def steps_saved(run: TrainConfig) -> list[int]:
    return [int(folder.name.removeprefix("step_")) for folder in find_checkpoints(Path(run.out))]


def asked_to_stop(process: int) -> None:
    os.kill(process, signal.SIGTERM)


# SIGTERM


@pytest.mark.fault("SIGTERM", "in a step", "saved after the step, status 75, the same final bits")
def test_sigterm_finishes_step_saves_and_exits_with_75(climb: Any, tmp_path: Path) -> None:
    out, log, watched = tmp_path / "run", tmp_path / "log", Watched()
    status = watched.run(climb.arguments(out), log, "step", times=8, then=asked_to_stop)
    assert status == runner.STOPPED == 75
    (folder,) = find_checkpoints(out)[-1:]
    assert folder.name in ("step_00000008", "step_00000009"), "one step more had perhaps begun"
    *_, last = log.read_text().splitlines()
    assert last == (
        f"tokengrow train: stopped by SIGTERM in stage small, step {int(folder.name[5:])}/12; the "
        f"same command resumes from {folder}"
    )
    assert watched.run(climb.arguments(out), log) == 0
    assert "resumes in stage small at step" in log.read_text()
    assert climb.ended_as_whole(out)


def test_a_step_is_finished_with_its_validation_and_saved(
    run: TrainConfig, store: TokenStore, whole: FitResult
) -> None:
    said = stopped(run, store, sent_at("n8  step 2/6"))
    assert steps_saved(run) == [2]
    assert said == (
        f"stopped by SIGTERM in stage n8, step 2/6; the same command resumes from "
        f"{run.out}/step_00000002"
    )
    assert same_bits(fit(run, store), whole)


def test_what_is_saved_already_is_not_saved_again(run: TrainConfig, store: TokenStore) -> None:
    said = stopped(run, store, sent_at("n8  step 4/6"))
    assert steps_saved(run) == [4]
    assert "step 4/6" in said


@pytest.mark.fault("SIGTERM", "in a growth", "the growth is finished; the same final bits")
def test_in_a_growth_nothing_is_saved_anew(
    run: TrainConfig, store: TokenStore, whole: FitResult
) -> None:
    said = stopped(run, store, sent_at("grown "))
    assert steps_saved(run) == [4, 6]
    assert "stage n12, step 0/6; the same command resumes from" in said
    assert said.endswith("step_00000006")
    assert same_bits(fit(run, store), whole)


@contextmanager
def sent_in_the_save_of(
    step: int, number: int = signal.SIGTERM, before: float = 0.0, after: float = 0.0
) -> Iterator[None]:
    """Send a signal while the checkpoint of a step is written.

    Args:
        step: step of the checkpoint.
        number: signal.
        before: delay after the start of the write, s.
        after: delay before its end, s.
    """
    save = checkpoint_writer.save_checkpoint

    def interrupted(folder: Path, checkpoint: Checkpoint) -> None:
        if checkpoint.step == step:
            time.sleep(before)
            os.kill(os.getpid(), number)
            time.sleep(after)
        save(folder, checkpoint)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_writer, "save_checkpoint", interrupted)
        yield


@pytest.mark.fault("SIGTERM", "in a save", "the save is finished; the same final bits")
@pytest.mark.parametrize(("step", "where"), [(4, "in stage n8, step "), (6, "before stage n12; ")])
def test_a_save_is_finished_first(
    run: TrainConfig, store: TokenStore, whole: FitResult, step: int, where: str
) -> None:
    with sent_in_the_save_of(step):
        said = stopped(run, store)
    assert said.startswith(f"stopped by SIGTERM {where}")
    assert step in steps_saved(run)
    assert same_bits(fit(run, store), whole)


def test_before_the_first_step_nothing_is_saved(run: TrainConfig, store: TokenStore) -> None:
    checked = Trainer.validate

    def validate(self: Trainer) -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        return checked(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "validate", validate)
        said = stopped(run, store)
    assert steps_saved(run) == []
    assert said.endswith(
        "step 0/6; the same command starts over, because no checkpoint is complete yet"
    )
    assert fit(run, store).state.step == 12


def test_a_run_that_has_done_its_last_step_ends_as_ever(
    run: TrainConfig, store: TokenStore, whole: FitResult
) -> None:
    assert same_bits(fit(run, store, sent_at("n12  step 6/6  loss")), whole)


# The request


@pytest.fixture
def heard() -> Iterator[list[int]]:
    """The numbers of the signals that reach a handler of SIGTERM that was there before."""
    numbers: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: numbers.append(number))
    yield numbers
    signal.signal(signal.SIGTERM, before)


def test_second_signal_has_its_previous_effect(
    heard: list[int],
) -> None:
    with StopRequest() as stop:
        assert not stop.requested()
        signal.raise_signal(signal.SIGTERM)
        assert (stop.requested(), heard) == (True, [])
        signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM]


def test_afterwards_the_handler_is_the_one_before(heard: list[int]) -> None:
    there = signal.getsignal(signal.SIGTERM)
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != there
    assert signal.getsignal(signal.SIGTERM) == there


def test_a_run_in_another_thread_trains_and_leaves_signals_alone(
    tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    there = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(fit, tiny_run(tmp_path / "run", rungs=(8,), steps=1), store).result()
    assert done.state.step == 1
    assert signal.getsignal(signal.SIGTERM) == there


# Ctrl-C


@pytest.mark.fault("Ctrl-C", "in a step", "status 130; what it says it resumes from is there")
@pytest.mark.parametrize(
    ("at", "resumes"),
    [
        ("n8  step 2/6", "the same command starts over, because no checkpoint is complete yet"),
        ("n12  step 2/6", "the same command resumes from {out}/step_00000006"),
    ],
    ids=["nothing saved", "saved"],
)
def test_an_interrupt_says_truly_what_the_same_command_will_do(
    run: TrainConfig, store: TokenStore, whole: FitResult, at: str, resumes: str
) -> None:
    with pytest.raises(KeyboardInterrupt) as interrupt:
        fit(run, store, sent_at(at, signal.SIGINT))
    assert interrupt.value.args == (resumes.format(out=run.out),)
    assert same_bits(fit(run, store), whole)


def test_an_interrupt_in_a_save_tells_of_it(
    run: TrainConfig, store: TokenStore, whole: FitResult
) -> None:
    in_it = sent_in_the_save_of(4, signal.SIGINT, before=0.1, after=0.2)
    with in_it, pytest.raises(KeyboardInterrupt) as interrupt:
        fit(run, store)
    assert interrupt.value.args == (f"the same command resumes from {run.out}/step_00000004",)
    assert same_bits(fit(run, store), whole)


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (KeyboardInterrupt("it goes on"), "tokengrow train: interrupted; it goes on\n"),
        (KeyboardInterrupt(), "tokengrow train: interrupted\n"),
    ],
)
def test_the_command_passes_on_what_an_interrupt_says(
    command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    raised: KeyboardInterrupt,
    said: str,
) -> None:
    def interrupted(config: object) -> None:
        raise raised

    monkeypatch.setattr("tokengrow.cli.train.main", interrupted)
    outcome: SimpleNamespace = command("train", "recipes=quickstart")
    assert (outcome.status, outcome.err) == (130, f"\n{said}")
