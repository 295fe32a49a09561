"""Tests of the progress of a stage: lines in a log file, a bar on a terminal."""

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from tokengrow.console.stage_progress import stage_progress

METRICS = {
    "train/loss": 3.14159,
    "train/grad_norm": 0.5,
    "train/lr": 1e-3,
    "tokens_per_second": 12345.6,
    "peak_memory_gb": 71.25,
}


def run_stage(console: Console, metrics: dict[str, float] = METRICS) -> str:
    """Show one step, one validation and one message, and return the output."""
    with stage_progress(console, "large", done=0, total=200) as progress:
        progress.update(100, metrics)
        progress.update_validation(100, 3.0)
        console.print("a message")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def log_file() -> Console:
    return Console(file=io.StringIO(), width=40)  # narrower than a line


def terminal(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, force_interactive=True)


def test_log_file_has_one_plain_line_per_logged_step() -> None:
    step, validation, message = run_stage(log_file()).splitlines()
    assert step == (
        "large  step 100/200  loss 3.1416  grad norm 0.500  lr 1.00e-03  12,346 tokens/s  "
        "71.2 GB  ETA 0:00:00"
    )
    assert validation == "large  step 100/200  validation loss 3.0000"
    assert message == "a message"


def test_log_file_has_the_share_of_peak_if_known() -> None:
    assert "  41.2% of peak  71.2 GB  " in run_stage(log_file(), METRICS | {"mfu": 0.4123})


def test_log_file_has_no_control_characters() -> None:
    assert all(character.isprintable() or character == "\n" for character in run_stage(log_file()))


def test_line_is_flushed_immediately(tmp_path: Path) -> None:
    path = tmp_path / "slurm.out"
    with (
        path.open("w", buffering=2**16) as file,  # Python buffers a file that is not a terminal
        stage_progress(Console(file=file), "large", done=0, total=200) as progress,
    ):
        progress.update(100, METRICS)
        assert path.read_text().endswith("\n")


def test_time_left_excludes_the_time_before_the_first_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = iter((0.0, 600.0, 610.0))  # ten minutes of compilation, then ten steps in ten seconds
    monkeypatch.setattr(time, "perf_counter", lambda: next(seconds))
    console = log_file()
    with stage_progress(console, "large", done=0, total=100_020) as progress:
        progress.update(10, METRICS)
        progress.update(20, METRICS)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines()[-1].endswith("ETA 1 day, 3:46:40")


def test_terminal_has_a_bar_and_keeps_messages() -> None:
    text = run_stage(terminal(80))
    assert "\x1b[" in text, "it is redrawn"
    assert "a message\n" in text
    last = text.splitlines()[-2]
    for part in ("large", "100/200", "loss 3.1416", "12,346 tokens/s", "ETA 0:00:00"):
        assert part in last


def test_wide_terminal_also_shows_validation_and_device() -> None:
    wide, narrow = run_stage(terminal(120)), run_stage(terminal(80))
    for part in ("val 3.0000", "71.2 GB"):
        assert part in wide
        assert part not in narrow


def test_quiet_console_shows_nothing_on_a_terminal() -> None:
    console = terminal(80)
    console.quiet = True
    assert run_stage(console) == ""
