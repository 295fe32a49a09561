"""Tests of the progress of commands: lines in a log file, a bar on a terminal."""

import re
from io import StringIO

import pytest
from rich.console import Console

from tokengrow.console.progress import count_progress, status_progress


def count_items(console: Console, done: int, total: int) -> str:
    """Complete all items and return the output."""
    with count_progress(console, "questions", done, total) as advance:
        for _ in range(total - done):
            advance()
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def without_times(line: str) -> str:
    """Return a progress line without its rate and its time left."""
    assert re.search(r", [\d.,e+]+/s(, \d+:\d\d:\d\d left)?$", line), line
    return line.partition("/s")[0].rpartition(", ")[0]


def test_log_file_has_a_line_at_each_tenth() -> None:
    first, *lines = count_items(Console(file=StringIO()), 0, 1000).splitlines()
    assert first == "questions: 1,000"
    assert [without_times(line) for line in lines] == [
        f"questions {n:,} of 1,000" for n in range(100, 1001, 100)
    ]


def test_line_has_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0, 4, 400])  # at the start, and at each of two items
    monkeypatch.setattr("tokengrow.console.progress.time.monotonic", lambda: next(seconds))
    assert count_items(Console(file=StringIO()), 0, 2).splitlines() == [
        "questions: 2",
        "questions 1 of 2, 0.25/s, 0:00:04 left",
        "questions 2 of 2, 0.005/s",
    ]


def test_items_done_before_are_counted() -> None:
    first, last = count_items(Console(file=StringIO()), 95, 100).splitlines()
    assert first == "questions: 100, 95 already done"
    assert without_times(last) == "questions 100 of 100"


def test_terminal_has_a_bar() -> None:
    console = Console(file=StringIO(), force_terminal=True, width=80, _environ={"TERM": "xterm"})
    assert "questions 5 of 5" in count_items(console, 0, 5)


def test_log_file_has_the_status_first_and_then_at_intervals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = StringIO()
    now = 0.0
    monkeypatch.setattr("tokengrow.console.progress.time.monotonic", lambda: now)
    with status_progress(Console(file=file), "reading") as update:
        assert file.getvalue() == "reading\n"
        for now in (1, 9, 12, 13):
            update(f"read {now}")
    assert file.getvalue() == "reading\nread 12\nread 13\n"


def test_quiet_console_shows_nothing() -> None:
    assert count_items(Console(file=StringIO(), quiet=True), 0, 5) == ""
