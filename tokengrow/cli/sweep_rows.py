"""Rows of a sweep, one per job: table and CSV file."""

import csv
import hashlib
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from tokengrow.console.format import (
    empty_table,
    format_count,
    format_power,
    format_three_digits,
)
from tokengrow.files import write_atomically

DONE, FAILED, UNFINISHED = "done", "failed", "unfinished"

MAX_NAME_LENGTH = 120
"""Maximum length of a job's directory name; a longer one is cut and ends with its hash."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Settings and result of one job."""

    folder: str
    """Directory of its run, relative to that of the sweep."""
    settings: Mapping[str, str]
    """Keys that the sweep varies, with the values of this job."""
    job: int | None
    """Number of the job; None: an earlier sweep into the same directory ran it."""
    sweep: int
    """Start of the last sweep that ran the job, ns since the epoch."""
    status: str = UNFINISHED
    """done, failed, or unfinished (running or killed)."""
    error: str | None = None
    """Error message of a failed job."""
    loss: float | None = None
    """Last validation loss, nats per token: the objective."""
    parameters: int | None = None
    """Number of parameters of the last model."""
    tokens: int | None = None
    """Tokens trained on in all stages."""
    flops: float | None = None
    """FLOPs spent in all stages."""
    seconds: float = 0.0
    """Wall-clock time of all training sessions, s."""

    @property
    def rank(self) -> tuple[float, int, int]:
        """Sort key: best loss first, unfinished jobs last."""
        return math.inf if self.loss is None else self.loss, self.sweep, self.job or 0

    @property
    def label(self) -> str:
        """Settings as typed on the command line."""
        return " ".join(f"{key}={value}" for key, value in self.settings.items())


COLUMNS = ("loss", "parameters", "tokens", "flops", "seconds", "status", "error", "folder")
"""Columns of sweep.csv after the job number and the varied keys."""


def short_groups(settings: Mapping[str, str]) -> dict[str, str]:
    """Shorten keys of groups, `recipes/NAME/arm`, to their last word if it is unique."""
    last = [key.rpartition("/")[2] for key in settings]
    return {
        word if last.count(word) == 1 else key: value
        for (key, value), word in zip(settings.items(), last, strict=True)
    }


def folder_name(settings: Mapping[str, str]) -> str:
    """Return the directory name of a job; the same settings give the same name in any sweep."""
    full = ",".join(f"{key}={value}" for key, value in settings.items())
    name = re.sub(r"[^\w.,=+-]", "_", full)
    if name == full and len(name) <= MAX_NAME_LENGTH:
        return name
    return f"{name[:MAX_NAME_LENGTH]}-{hashlib.sha256(full.encode()).hexdigest()[:8]}"


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write the rows as CSV, with a column per varied key."""
    keys = _keys(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, ["job", *keys, *COLUMNS], extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        writer.writerow({**asdict(row), **row.settings})
    write_atomically(path, text.getvalue().encode())


def sweep_table(rows: Sequence[Row]) -> Table:
    """Return a table with one line per job; sweep.csv also has error messages and directories."""
    keys = _keys(rows)
    headers = (
        *(key.replace(".", ".\n") for key in keys),
        "validation\nloss",
        "para-\nmeters",
        "tokens",
        "FLOPs",
        "seconds",
        "status",
    )
    made = empty_table("Jobs of the sweep, best first", "job", headers)
    for row in rows:
        made.add_row(
            _format(row.job, str),
            *(_short(row.settings.get(key, "")) for key in keys),
            _format(row.loss, "{:.5f}".format),
            _format(row.parameters, format_count),
            _format(row.tokens, format_count),
            _format(row.flops, format_power),
            format_three_digits(row.seconds),
            row.status,
        )
    return made


def _keys(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row.settings))


def _short(setting: str) -> str:
    """Shorten a setting for its column: a long number gets four digits."""
    if len(setting) <= 8:
        return setting
    try:
        return f"{float(setting):.4g}"
    except ValueError:
        return setting


def _format(value: Any, formatter: Callable[[Any], str]) -> str:
    return "-" if value is None else formatter(value)
