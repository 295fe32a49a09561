"""What an evaluation shows while it goes on."""

import re
from io import StringIO

import pytest
from rich.console import Console

from tokengrow.console.progress import counted, doing


def shown(console: Console, done: int, total: int) -> str:
    with counted(console, "questions", done, total) as advance:
        for _ in range(total - done):
            advance()
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def counts(line: str) -> str:
    """A line without how fast and how long."""
    assert re.search(r", [\d.,e+]+/s(, \d+:\d\d left)?$", line), line
    return line.partition("/s")[0].rpartition(", ")[0]


def test_a_log_file_has_a_line_at_each_tenth() -> None:
    first, *lines = shown(Console(file=StringIO()), 0, 1000).splitlines()
    assert first == "questions: 1,000"
    assert [counts(line) for line in lines] == [
        f"questions {n:,} of 1,000" for n in range(100, 1001, 100)
    ]


def test_a_line_tells_how_fast_and_how_long_the_rest_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = iter([0, 4, 400])  # when it begins, and at each of two
    monkeypatch.setattr("tokengrow.console.progress.time.monotonic", lambda: next(seconds))
    assert shown(Console(file=StringIO()), 0, 2).splitlines() == [
        "questions: 2",
        "questions 1 of 2, 0.25/s, 0:04 left",
        "questions 2 of 2, 0.005/s",
    ]


def test_what_was_known_before_counts() -> None:
    first, last = shown(Console(file=StringIO()), 95, 100).splitlines()
    assert first == "questions: 100, 95 of them known from before"
    assert counts(last) == "questions 100 of 100"


def test_a_terminal_has_a_bar() -> None:
    console = Console(file=StringIO(), force_terminal=True, width=80, _environ={"TERM": "xterm"})
    assert "questions 5 of 5" in shown(console, 0, 5)


def test_a_log_file_has_what_is_done_at_once_and_then_a_line_at_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = StringIO()
    now = 0.0
    monkeypatch.setattr("tokengrow.console.progress.time.monotonic", lambda: now)
    with doing(Console(file=file), "reading") as say:
        assert file.getvalue() == "reading\n"
        for now in (1, 9, 12, 13):
            say(f"read {now}")
    assert file.getvalue() == "reading\nread 12\nread 13\n"


def test_a_quiet_console_shows_nothing() -> None:
    assert shown(Console(file=StringIO(), quiet=True), 0, 5) == ""
