"""Progress of a training stage: a live bar on a terminal, plain lines in a log file."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn

from tokengrow.console.format import format_clock

MIN_WIDE_COLUMNS = 115
"""Minimum terminal width for the columns of the validation loss and the device."""


class StageProgress:
    """Progress of one stage, updated at every logged step and every validation."""

    def __init__(self, console: Console, name: str, done: int, total: int) -> None:
        self.console, self.name, self.total = console, name, total
        self._eta_start, self._step_logged = (done, time.perf_counter()), False
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
        """Show a logged step.

        Args:
            step: updates done in the stage.
            metrics: train/loss (nats per token), train/grad_norm, train/lr, tokens_per_second and,
                if known, mfu and peak_memory_gb.
        """
        loss, rate = f"{metrics['train/loss']:.4f}", _format_rate(metrics["tokens_per_second"])
        device, eta = _format_device(metrics), self._time_left(step)
        if self.bar is not None:
            self.bar.update(
                self._task, completed=step, loss=loss, rate=rate, device=device, eta=eta
            )
            return
        self._print_line(
            step,
            f"loss {loss}",
            f"grad norm {metrics['train/grad_norm']:.3f}",
            f"lr {metrics['train/lr']:.2e}",
            rate,
            device,
            f"ETA {eta}",
        )

    def update_validation(self, step: int, loss: float) -> None:
        """Show a validation loss.

        Args:
            step: updates done in the stage.
            loss: validation loss, nats per token.
        """
        if self.bar is not None:
            self.bar.update(self._task, validation=f"{loss:.4f}")
        else:
            self._print_line(step, f"validation loss {loss:.4f}")

    def _print_line(self, step: int, *parts: str) -> None:
        """Print one line of a log file; rich flushes it immediately."""
        line = "  ".join((self.name, f"step {step}/{self.total}", *filter(None, parts)))
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _time_left(self, step: int) -> str:
        """Return the time left at the speed since the first logged step.

        Compilation and allocation take place before that step and are not counted.
        """
        (first, start), now = self._eta_start, time.perf_counter()
        if not self._step_logged:
            self._eta_start, self._step_logged = (step, now), True
        return format_clock((now - start) / max(step - first, 1) * (self.total - step))


def _columns(width: int) -> list[ProgressColumn]:
    wide = [TextColumn("val {task.fields[validation]}"), TextColumn("{task.fields[device]}")]
    return [
        TextColumn("[bold]{task.description:<10}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        *(wide if width >= MIN_WIDE_COLUMNS else []),
        TextColumn("{task.fields[rate]}"),
        TextColumn("ETA {task.fields[eta]}"),
    ]


def _format_rate(tokens_per_second: float) -> str:
    """Format a throughput, in thousands from 100,000 tokens per second."""
    if tokens_per_second < 1e5:
        return f"{tokens_per_second:,.0f} tokens/s"
    return f"{tokens_per_second / 1e3:,.0f}k tokens/s"


def _format_device(metrics: Mapping[str, float]) -> str:
    """Format the known metrics of the device: share of its peak FLOPs, and its memory."""
    parts = []
    if "mfu" in metrics:
        parts.append(f"{metrics['mfu']:.1%} of peak")
    if "peak_memory_gb" in metrics:
        parts.append(f"{metrics['peak_memory_gb']:.1f} GB")
    return "  ".join(parts)


@contextmanager
def stage_progress(console: Console, name: str, done: int, total: int) -> Iterator[StageProgress]:
    """Show the progress of a stage while the block runs.

    Args:
        console: console to write to; a quiet one shows nothing.
        name: name of the stage.
        done: updates done before this session.
        total: updates of the stage.
    """
    progress = StageProgress(console, name, done, total)
    if progress.bar is None:
        yield progress
        return
    with progress.bar:
        yield progress
