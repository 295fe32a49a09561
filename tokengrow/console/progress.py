"""What an evaluation shows while it goes on: a moving line at a terminal, else lines of a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

Advance = Callable[[], None]
"""To be called when one more is done."""

SECONDS = 10
"""From line to line of a log, of what has no known end."""


@contextmanager
def doing(console: Console, what: str) -> Iterator[Callable[[str], None]]:
    """Says what is done while the block runs; gives what says how far it is by now.

    Args:
        console: where; a quiet one shows nothing.
        what: is done.
    """
    if console.is_interactive:
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        with Progress(*columns, console=console, disable=console.quiet, transient=True) as moving:
            task = moving.add_task(what, total=None)
            yield lambda line: moving.update(task, description=line)
        return
    console.print(what, highlight=False)
    shown, waiting = time.monotonic(), ""

    def say(line: str) -> None:
        nonlocal shown, waiting
        waiting = line
        if time.monotonic() - shown >= SECONDS:
            console.print(line, highlight=False)
            shown, waiting = time.monotonic(), ""

    yield say
    if waiting:
        console.print(waiting, highlight=False)


@contextmanager
def counted(console: Console, what: str, done: int, total: int) -> Iterator[Advance]:
    """Shows how many are done while the block runs, how fast, and how long the rest takes.

    Args:
        console: where; a quiet one shows nothing.
        what: they are.
        done: before the block.
        total: in the end.
    """
    known = f", {done:,} of them known from before" if done else ""
    begun, count = time.monotonic(), done

    def line() -> str:
        rate = (count - done) / max(time.monotonic() - begun, 1e-9)
        left = f", {_clock((total - count) / rate)} left" if count < total else ""
        return f"{what} {count:,} of {total:,}, {rate:,.3g}/s{left}"

    if console.is_interactive:
        columns = BarColumn(bar_width=20), TextColumn("{task.description}")
        with Progress(*columns, console=console, disable=console.quiet) as bar:
            task = bar.add_task(f"{what} {done:,} of {total:,}", total=total, completed=done)

            def moved() -> None:
                nonlocal count
                count += 1
                bar.update(task, completed=count, description=line())

            yield moved
        return
    console.print(f"{what}: {total:,}{known}", highlight=False)

    def advance() -> None:
        nonlocal count
        count += 1
        if 10 * count // total > 10 * (count - 1) // total:
            console.print(line(), highlight=False)

    yield advance


def _clock(seconds: float) -> str:
    """As 1:06, or 2:01:06."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
