"""Rows of a benchmark, as CSV on stdout, each as soon as it is measured."""

import csv
import sys
from collections.abc import Iterable, Mapping
from typing import Any


def print_rows(rows: Iterable[Mapping[str, Any]]) -> None:
    """Prints a header and every row; all have the keys of the first."""
    writer: csv.DictWriter[str] | None = None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(sys.stdout, list(row))
            writer.writeheader()
        writer.writerow(row)
        sys.stdout.flush()
