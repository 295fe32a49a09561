"""What a run shows while it trains: a live bar on a terminal, plain lines in a log file."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn

WIDE = 115
"""Columns of a terminal from which the bar also shows how the device is used."""


class StageProgress:
    """One stage's progress; `update` it at every logged step."""

    def __init__(self, console: Console, name: str, done: int, total: int) -> None:
        self.console, self.name, self.total = console, name, total
        self._since, self._seen = (done, time.perf_counter()), False
        self.bar: Progress | None = None
        if console.is_interactive and not console.quiet:
            self.bar = Progress(*_columns(console.width), console=console, expand=True)
            self._task = self.bar.add_task(
                name,
                total=total,
                completed=done,
                loss="-",
                validation="-",
                rate="- tokens/s",
                eta="-",
                device="",
            )

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows a step of the stage.

        Args:
            step: updates done in the stage.
            metrics: train/loss (nats per token), train/grad_norm, train/lr, tokens_per_second and,
                where they are known, mfu and peak_memory_gb.
        """
        loss, rate = f"{metrics['train/loss']:.4f}", _rate(metrics["tokens_per_second"])
        device, eta = _device(metrics), self._time_left(step)
        if self.bar is not None:
            self.bar.update(
                self._task, completed=step, loss=loss, rate=rate, device=device, eta=eta
            )
            return
        self._line(
            step,
            f"loss {loss}",
            f"grad norm {metrics['train/grad_norm']:.3f}",
            f"lr {metrics['train/lr']:.2e}",
            rate,
            device,
            f"ETA {eta}",
        )

    def validated(self, step: int, loss: float) -> None:
        """Shows a validation loss, nats per token."""
        if self.bar is not None:
            self.bar.update(self._task, validation=f"{loss:.4f}")
        else:
            self._line(step, f"validation loss {loss:.4f}")

    def _line(self, step: int, *parts: str) -> None:
        """Prints a line, which rich flushes at once."""
        shown = (self.name, f"step {step}/{self.total}", *filter(None, parts))
        self.console.print("  ".join(shown), markup=False, highlight=False, soft_wrap=True)

    def _time_left(self, step: int) -> str:
        """At the pace since the first logged step: what came before compiled and allocated."""
        (first, since), now = self._since, time.perf_counter()
        if not self._seen:
            self._since, self._seen = (step, now), True
        seconds = (now - since) / max(step - first, 1) * (self.total - step)
        return str(timedelta(seconds=int(seconds)))


def _columns(width: int) -> list[ProgressColumn]:
    wide = [TextColumn("val {task.fields[validation]}"), TextColumn("{task.fields[device]}")]
    return [
        TextColumn("[bold]{task.description:<10}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        *(wide if width >= WIDE else []),
        TextColumn("{task.fields[rate]}"),
        TextColumn("ETA {task.fields[eta]}"),
    ]


def _rate(tokens_per_second: float) -> str:
    """In thousands once there are many."""
    if tokens_per_second < 1e5:
        return f"{tokens_per_second:,.0f} tokens/s"
    return f"{tokens_per_second / 1e3:,.0f}k tokens/s"


def _device(metrics: Mapping[str, float]) -> str:
    """Share of peak and memory, of what is known."""
    parts = []
    if "mfu" in metrics:
        parts.append(f"{metrics['mfu']:.1%} of peak")
    if "peak_memory_gb" in metrics:
        parts.append(f"{metrics['peak_memory_gb']:.1f} GB")
    return "  ".join(parts)


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
    if progress.bar is None:
        yield progress
        return
    with progress.bar:
        yield progress
