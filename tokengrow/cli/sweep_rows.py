"""The rows of a sweep, one for each job: as a table, and as a CSV file."""

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

from tokengrow.console.format import count, power, table, three_digits
from tokengrow.files import write_atomically

DONE, FAILED, UNFINISHED = "done", "failed", "unfinished"

LONGEST_NAME = 120
"""Characters of a job's folder; a longer one is cut, and ends with a hash of the whole."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A job: what it set, and what came of it."""

    folder: str
    """Of its run, in the sweep's."""
    settings: Mapping[str, str]
    """The keys that the sweep varies, and their values in this job."""
    job: int | None
    """Its number; None: of an earlier sweep into the same folder."""
    sweep: int
    """When the sweep was started in which the job ran last, ns since the epoch."""
    status: str = UNFINISHED
    """done, failed, or unfinished: running, or killed."""
    error: str | None = None
    """Why it failed."""
    loss: float | None = None
    """Last validation loss, nats per token: the objective."""
    parameters: int | None = None
    """Of the last model."""
    tokens: int | None = None
    """Trained on in all stages."""
    flops: float | None = None
    """Spent in all stages."""
    seconds: float = 0.0
    """Wall-clock time of the sessions that trained."""

    @property
    def rank(self) -> tuple[float, int, int]:
        """By which rows are sorted: best first, what is not done last."""
        return math.inf if self.loss is None else self.loss, self.sweep, self.job or 0

    @property
    def label(self) -> str:
        """The settings, as typed."""
        return " ".join(f"{key}={value}" for key, value in self.settings.items())


COLUMNS = ("loss", "parameters", "tokens", "flops", "seconds", "status", "error", "folder")
"""Of sweep.csv, behind the job and the keys that were varied."""


def short_groups(settings: Mapping[str, str]) -> dict[str, str]:
    """Settings whose groups, `recipes/NAME/arm`, go by their last word, where that is one's own."""
    last = [key.rpartition("/")[2] for key in settings]
    return {
        word if last.count(word) == 1 else key: value
        for (key, value), word in zip(settings.items(), last, strict=True)
    }


def folder_name(settings: Mapping[str, str]) -> str:
    """A job's folder, after what it sets: the same job is found again in a larger sweep."""
    whole = ",".join(f"{key}={value}" for key, value in settings.items())
    name = re.sub(r"[^\w.,=+-]", "_", whole)
    if name == whole and len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Writes the rows, with a column for each key that one of them sets."""
    keys = _keys(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, ["job", *keys, *COLUMNS], extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        writer.writerow({**asdict(row), **row.settings})
    write_atomically(path, text.getvalue().encode())


def sweep_table(rows: Sequence[Row]) -> Table:
    """One line per job; why one failed, and the folders, stand in sweep.csv."""
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
    made = table("Jobs of the sweep, the best one first", "job", headers)
    for row in rows:
        made.add_row(
            _shown(row.job, str),
            *(_short(row.settings.get(key, "")) for key in keys),
            _shown(row.loss, "{:.5f}".format),
            _shown(row.parameters, count),
            _shown(row.tokens, count),
            _shown(row.flops, power),
            three_digits(row.seconds),
            row.status,
        )
    return made


def _keys(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row.settings))


def _short(setting: str) -> str:
    """A setting as its column shows it: a number that a sampler drew has four digits there."""
    if len(setting) <= 8:
        return setting
    try:
        return f"{float(setting):.4g}"
    except ValueError:
        return setting


def _shown(value: Any, how: Callable[[Any], str]) -> str:
    return "-" if value is None else how(value)
