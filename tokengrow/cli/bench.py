"""tokengrow bench: how fast it is here, now, beside its peers and the limit."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from tokengrow.bench import pattention, step
from tokengrow.bench.rows import Measurement, append_rows, check_appendable
from tokengrow.cli.resolve import plain
from tokengrow.cli.verb import run_verb
from tokengrow.distributed.fabric import FabricConfig
from tokengrow.errors import UserError
from tokengrow.evaluation.format import table
from tokengrow.model.config import ModelConfig
from tokengrow.typed import nearest, typed

SUITES = {
    "pattention": ("One layer, forward and backward", "times the\nsix products"),
    "step": ("A training step", "share of a\nlarge product"),
}
"""Suite to the title of its table and what its times are held against."""


@dataclass(frozen=True, kw_only=True)
class BenchArguments:
    """The keys of bench.yaml."""

    suite: str
    """A key of `SUITES`."""
    out: str | None
    """CSV file to which the rows are added."""
    fabric: FabricConfig
    """Device and precision."""
    shapes: list[list[int]]
    """(D, N) of the layers."""
    tokens: int
    """Input tokens of a layer."""
    models: list[str]
    """Presets that are trained."""
    batches: list[int]
    """Sequences in a step, for each of them."""
    peers: list[str] | None
    """Some of the peers of a step; null: all."""

    def __post_init__(self) -> None:
        if self.suite not in SUITES:
            raise UserError(f"suite {self.suite!r}{nearest(self.suite, list(SUITES))}")
        if len(self.batches) != len(self.models):
            raise UserError(
                f"batches has {len(self.batches)} entries for {len(self.models)} models: give one "
                "for each"
            )
        for peer in self.peers or []:
            if peer not in step.PEERS:
                raise UserError(f"peers {peer!r}{nearest(peer, list(step.PEERS))}")
        if self.tokens < 1 or not all(len(s) == 2 and min(s) > 0 for s in self.shapes):
            raise UserError("shapes must be pairs [D, N], and tokens a number, all above 0")


def main(config: DictConfig) -> None:
    """Measures a suite: a table, and rows in `out`."""
    arguments = typed(BenchArguments, plain(config))
    console = Console(highlight=False)
    out = Path(arguments.out) if arguments.out else None
    if out:
        check_appendable(out)
    rows: list[Measurement] = []
    with console.status("measuring") as status:
        for row in _rows(arguments):
            rows.append(row)
            status.update(f"measured {row.case}: {row.peer}")
            if out:
                append_rows(out, [row])
    console.print(_table(arguments.suite, rows))
    console.print(f"on {rows[0].device}, torch {rows[0].torch_version}")
    if out:
        console.print(f"rows: {out}", soft_wrap=True)


def _rows(arguments: BenchArguments) -> Iterator[Measurement]:
    fabric = arguments.fabric
    if arguments.suite == "step":
        models = zip(arguments.models, arguments.batches, strict=True)
        cases = [(name, ModelConfig.preset(name), batch) for name, batch in models]
        return step.measure(cases, fabric, arguments.peers or list(step.PEERS))
    device = torch.device("cuda" if fabric.on_gpu else "cpu")
    dtype = torch.float32 if fabric.chosen_precision == "32-true" else torch.bfloat16
    shapes = [(d, n) for d, n in arguments.shapes]
    return pattention.measure(shapes, arguments.tokens, dtype, device)


def _table(suite: str, rows: list[Measurement]) -> Table:
    """A line for each row, with the case where it changes."""
    title, against = SUITES[suite]
    made = table(title, "", ("median\nms", "p20", "p80", against, "peak\nGB"))
    case = None
    for row in rows:
        if row.case != case:
            case = row.case
            made.add_section()
            made.add_row(case)
        made.add_row(f"  {row.peer}", *_numbers(row))
    return made


def _numbers(row: Measurement) -> list[Any]:
    if math.isnan(row.median_ms):
        return ["out of", "memory"]
    peak = f"{row.peak_gb:.2f}" if row.peak_gb else "-"
    times = (f"{time:.3f}" for time in (row.median_ms, row.p20_ms, row.p80_ms))
    return [*times, f"{row.against_limit:.3f}", peak]


if __name__ == "__main__":
    run_verb("bench", main)
