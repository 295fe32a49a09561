"""Numbers and tables as people read them, within 80 columns."""

import re

from rich import box
from rich.table import Table
from rich.text import Text


def count(number: float) -> str:
    """A quantity with three digits: 12_345_678 is `12.3M`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


def power(number: float) -> str:
    """A large quantity as a power of ten: 307_000_000 is `3.07e8`."""
    return f"{number:.2e}".replace("e+0", "e").replace("e+", "e")


LONGEST_NAME = 28
"""Characters of a line of a run's name in a table of 80 columns."""


def folded(name: str, length: int = LONGEST_NAME) -> str:
    """A name in lines of at most `length` characters, which end at a comma or a slash where they
    can."""
    lines = [""]
    for piece in re.findall(rf"[^,/]{{0,{length - 1}}}[,/]|[^,/]{{1,{length}}}", name):
        if len(lines[-1]) + len(piece) > length:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)


def exponent(number: float) -> str:
    """A quantity by its order if it is small: 7.12e-15 is `7.1e-15`, 12.62 is `12.6`, and what is
    exactly 0 is `0`."""
    if number >= 1:
        return three_digits(number)
    return f"{number:.1e}" if number else "0"


def three_digits(number: float) -> str:
    """A quantity that may be small or large: 0.28661 is `0.287`, 1234.5 is `1,234`."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def bytes_text(number: int) -> str:
    """Bytes in decimal units: 9_440_256 is `9.4 MB`."""
    for size, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B"


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message without its full stop, or else its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def table(title: str, name: str, numbers: tuple[str, ...], caption: str | None = None) -> Table:
    """An empty table: one column of names, then columns of numbers; a header may hold a newline.

    Args:
        title: above it, in one line.
        name: header of the first column.
        numbers: headers of the others.
        caption: what one has to know, below it.
    """
    made = Table(
        title=Text(title, style="table.title", no_wrap=True, overflow="ignore"),
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    made.add_column(name, no_wrap=True)
    for header in numbers:
        made.add_column(header, justify="right", no_wrap=True)
    return made
