"""Formatting of numbers, names, durations and tables for a terminal of 80 columns."""

import re
from datetime import timedelta

from rich import box
from rich.table import Table
from rich.text import Text

MAX_NAME_LENGTH = 28
"""Maximum number of characters in one line of a run name in a table of 80 columns."""


def format_count(number: float) -> str:
    """Format a quantity with three digits and a unit: 12_345_678 as `12.3M`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


def format_bytes(number: int) -> str:
    """Format a number of bytes in decimal units: 9_440_256 as `9.4 MB`."""
    for size, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B"


def format_power(number: float) -> str:
    """Format a large quantity as a power of ten: 307_000_000 as `3.07e8`."""
    return f"{number:.2e}".replace("e+0", "e").replace("e+", "e")


def format_small_number(number: float) -> str:
    """Format a quantity that may be tiny: 7.12e-15 as `7.1e-15`, 12.62 as `12.6`, 0 as `0`."""
    if number >= 1:
        return format_three_digits(number)
    return f"{number:.1e}" if number else "0"


def format_three_digits(number: float) -> str:
    """Format a quantity with three digits: 0.28661 as `0.287`, 1234.5 as `1,234`."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def format_duration(seconds: float) -> str:
    """Format a duration: 41.3 as `41 s`, 3723 as `62 min`, 10_000 as `2 h 47 min`."""
    if round(seconds) < 100:
        return f"{round(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def format_clock(seconds: float) -> str:
    """Format a duration to the second: 66 as `0:01:06`, 100_000 as `1 day, 3:46:40`."""
    return str(timedelta(seconds=int(seconds)))


def fold_name(name: str, length: int = MAX_NAME_LENGTH) -> str:
    """Break a name into lines of at most `length` characters, if possible at commas and slashes."""
    lines = [""]
    for piece in re.findall(rf"[^,/]{{0,{length - 1}}}[,/]|[^,/]{{1,{length}}}", name):
        if len(lines[-1]) + len(piece) > length:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message without its full stop, or else its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def empty_table(
    title: str, name: str, numbers: tuple[str, ...], caption: str | None = None
) -> Table:
    """Return a table without rows: one column of names, then columns of numbers.

    Args:
        title: title above the table, on one line.
        name: header of the first column.
        numbers: headers of the other columns; a header may contain a newline.
        caption: explanation below the table.
    """
    table = Table(
        title=Text(title, style="table.title", no_wrap=True, overflow="ignore"),
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column(name, no_wrap=True)
    for header in numbers:
        table.add_column(header, justify="right", no_wrap=True)
    return table
