"""What an evaluation shows while it goes on."""

from io import StringIO

from rich.console import Console

from tokengrow.evaluation.harness_progress import counted


def shown(console: Console, done: int, total: int) -> str:
    with counted(console, "questions", done, total) as advance:
        for _ in range(total - done):
            advance()
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_a_log_file_has_a_line_at_each_tenth() -> None:
    lines = shown(Console(file=StringIO()), 0, 1000).splitlines()
    assert lines[0] == "questions: 1,000"
    assert lines[1:] == [f"questions: {n:,} of 1,000" for n in range(100, 1001, 100)]


def test_few_are_as_many_lines() -> None:
    assert shown(Console(file=StringIO()), 0, 2).splitlines() == [
        "questions: 2",
        "questions: 1 of 2",
        "questions: 2 of 2",
    ]


def test_what_was_known_before_counts() -> None:
    lines = shown(Console(file=StringIO()), 95, 100).splitlines()
    assert lines == ["questions: 100 (95 known from before)", "questions: 100 of 100"]


def test_a_terminal_has_a_bar() -> None:
    console = Console(file=StringIO(), force_terminal=True, width=80, _environ={"TERM": "xterm"})
    assert "5/5" in shown(console, 0, 5)


def test_a_quiet_console_shows_nothing() -> None:
    assert shown(Console(file=StringIO(), quiet=True), 0, 5) == ""
