"""Rows of a benchmark: what was measured, on what, with what."""

import csv
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import torch

from tokengrow.bench.timing import Timing
from tokengrow.distributed.fabric import device_name
from tokengrow.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One row: a peer in a case of a suite."""

    suite: str
    """pattention, step, decode or data."""
    case: str
    """Sizes."""
    peer: str
    """Name of the timed function."""
    dtype: str
    """Data type of the matrix products, or precision of training."""
    median_ms: float
    """Median time of a call, ms."""
    p20_ms: float
    p80_ms: float
    against_limit: float
    """pattention: times its six products; step: share of the rate of a large product; decode: share
    of the memory limit; data: share of the bare tokenizer, or of reading in sequence."""
    peak_gb: float
    """Peak GPU memory, GB."""
    error: float
    """Relative error in the numerics check; 0 for the reference."""
    device: str
    torch_version: str
    triton_version: str
    rate: float = 0.0
    """data: of what passes, in units per second."""
    unit: str = ""
    """Unit of the rate: MB/s of UTF-8 text, or M tokens/s."""

    @classmethod
    def on(cls, device: torch.device, timing: Timing, **columns: Any) -> "Measurement":
        """Build a row measured on a device."""
        return cls(
            median_ms=round(timing.median, 4),
            p20_ms=round(timing.p20, 4),
            p80_ms=round(timing.p80, 4),
            device=device_name(device),
            torch_version=torch.__version__,
            triton_version=version("triton") if find_spec("triton") else "",
            **columns,
        )


def print_rows(rows: Iterable[Mapping[str, Any]]) -> None:
    """Print a header and every row as CSV, each as soon as it is measured.

    All rows must have the keys of the first one.
    """
    _write(rows, sys.stdout, header=True)


def check_appendable(path: Path) -> None:
    """Refuses a file that holds something else than rows, before anything is measured.

    Raises:
        UserError: it does.
    """
    if path.is_dir():
        raise UserError(f"out={path} is a folder: give a file, out={path}/rows.csv")
    there = path.read_text(encoding="utf-8") if path.exists() else ""
    if there and there.partition("\n")[0] != _header():
        raise UserError(f"out={path} holds something that bench did not write: choose another out=")


def append_rows(path: Path, rows: Iterable[Measurement]) -> None:
    """Append rows to a CSV file, each flushed to disk at once."""
    new = not path.exists() or path.stat().st_size == 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", newline="") as file:
        _write((asdict(row) for row in rows), file, header=new)


def _header() -> str:
    return ",".join(field.name for field in fields(Measurement))


def _write(rows: Iterable[Mapping[str, Any]], file: TextIO, header: bool) -> None:
    writer: csv.DictWriter[str] | None = None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            if header:
                writer.writeheader()
        writer.writerow(row)
        file.flush()
