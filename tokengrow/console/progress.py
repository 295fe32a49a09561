"""Progress of a command: a live line on a terminal, plain lines in a log file."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tokengrow.console.format import format_clock

Advance = Callable[[], None]
"""Function to call after each completed item."""

LOG_INTERVAL = 10
"""Minimum time between two lines of a log file in `status_progress`, seconds."""


@contextmanager
def status_progress(console: Console, status: str) -> Iterator[Callable[[str], None]]:
    """Show the status of an activity of unknown length, and yield a function that updates it.

    Args:
        console: console to write to; a quiet one shows nothing.
        status: first status line.
    """
    if console.is_interactive:
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        with Progress(*columns, console=console, disable=console.quiet, transient=True) as bar:
            task = bar.add_task(status, total=None)
            yield lambda line: bar.update(task, description=line)
        return
    console.print(status, highlight=False)
    printed_at, pending = time.monotonic(), ""

    def update(line: str) -> None:
        nonlocal printed_at, pending
        pending = line
        if time.monotonic() - printed_at >= LOG_INTERVAL:
            console.print(line, highlight=False)
            printed_at, pending = time.monotonic(), ""

    yield update
    if pending:
        console.print(pending, highlight=False)


@contextmanager
def count_progress(console: Console, label: str, done: int, total: int) -> Iterator[Advance]:
    """Show the number of completed items, their rate and the time left.

    Args:
        console: console to write to; a quiet one shows nothing.
        label: plural noun for the items.
        done: number of items that were completed before.
        total: number of all items.
    """
    started_at, count = time.monotonic(), done

    def progress_line() -> str:
        rate = (count - done) / max(time.monotonic() - started_at, 1e-9)
        left = f", {format_clock((total - count) / rate)} left" if count < total else ""
        return f"{label} {count:,} of {total:,}, {rate:,.3g}/s{left}"

    if console.is_interactive:
        columns = BarColumn(bar_width=20), TextColumn("{task.description}")
        with Progress(*columns, console=console, disable=console.quiet) as bar:
            task = bar.add_task(f"{label} {done:,} of {total:,}", total=total, completed=done)

            def advance_bar() -> None:
                nonlocal count
                count += 1
                bar.update(task, completed=count, description=progress_line())

            yield advance_bar
        return
    already_done = f", {done:,} already done" if done else ""
    console.print(f"{label}: {total:,}{already_done}", highlight=False)

    def advance_log() -> None:
        nonlocal count
        count += 1
        if 10 * count // total > 10 * (count - 1) // total:
            console.print(progress_line(), highlight=False)

    yield advance_log
