"""What a run shows while it trains: a live bar on a terminal, plain lines in a log file."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)


class StageProgress:
    """One stage's progress; `update` it at every logged step."""

    def __init__(self, console: Console, name: str, done: int, total: int) -> None:
        self.console, self.name, self.total = console, name, total
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._first, self._started = done, time.perf_counter()
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description:<10}"),
                BarColumn(bar_width=None),
                TextColumn("step"),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}"),
                TextColumn("{task.fields[rate]} tokens/s"),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=console,
                expand=True,
            )
            self._task = self._bar.add_task(name, total=total, completed=done, loss="-", rate="-")

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Shows a step of the stage, its loss (nats per token) and the speed."""
        rate = f"{tokens_per_second:,.0f}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, loss=f"{loss:.4f}", rate=rate)
            return
        spent = time.perf_counter() - self._started
        left = spent / max(step - self._first, 1) * (self.total - step)
        self.console.print(
            f"{self.name}  step {step}/{self.total}  loss {loss:.4f}  {rate} tokens/s  "
            f"ETA {int(left) // 60}:{int(left) % 60:02d}",
            highlight=False,
        )


@contextmanager
def stage_progress(console: Console, name: str, done: int, total: int) -> Iterator[StageProgress]:
    """Shows a stage's progress while the block runs.

    Args:
        console: where; a quiet one shows nothing.
        name: of the stage.
        done: updates done before this session.
        total: updates of the stage.
    """
    progress = StageProgress(console, name, done, total)
    if progress._bar is None:
        yield progress
        return
    with progress._bar:
        yield progress
