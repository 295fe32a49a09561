"""What an evaluation shows while it goes on: a bar on a terminal, else a line at each tenth."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Advance = Callable[[], None]
"""To be called when one more is done."""


@contextmanager
def counted(console: Console, what: str, done: int, total: int) -> Iterator[Advance]:
    """Shows how many are done while the block runs.

    Args:
        console: where; a quiet one shows nothing.
        what: they are.
        done: before the block.
        total: in the end.
    """
    if console.is_interactive and not console.quiet:
        columns = [
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
        ]
        with Progress(*columns, console=console, expand=True) as bar:
            task = bar.add_task(what, total=total, completed=done)
            yield lambda: bar.advance(task)
        return
    known = f" ({done:,} known from before)" if done else ""
    console.print(f"{what}: {total:,}{known}", highlight=False)
    count = done

    def advance() -> None:
        nonlocal count
        count += 1
        if 10 * count // total > 10 * (count - 1) // total:
            console.print(f"{what}: {count:,} of {total:,}", highlight=False)

    yield advance
