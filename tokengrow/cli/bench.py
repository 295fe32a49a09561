"""tokengrow bench: measure speed next to baselines and the hardware limit."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from tokengrow.bench import data, decode, pattention, step
from tokengrow.bench.rows import Measurement, append_rows, check_appendable
from tokengrow.cli.config import plain_values
from tokengrow.cli.runner import run_command
from tokengrow.console.format import empty_table
from tokengrow.data.sections import resolve_corpus, resolve_tokenizer
from tokengrow.data.tokenizer import prepare_tokenizer
from tokengrow.distributed.fabric import FabricConfig
from tokengrow.errors import UserError
from tokengrow.model.config import ModelConfig, ParameterTokens
from tokengrow.parsing import parse_dataclass, suggest
from tokengrow.paths import cache_dir

SUITES = {
    "pattention": ("One layer, forward and backward", "times the\nsix products"),
    "step": ("A training step", "share of a\nlarge product"),
    "decode": ("A token of one text", "share of\nthe limit"),
    "data": ("Text to tokens, tokens to batches", "share of\nthe limit"),
}
"""Suite to the title of its table and the header of its relative column."""

RELEASED_SHAPES = [[768, 768], [768, 3072], [1024, 4096], [1280, 5120], [1536, 1536], [1536, 6144]]
SMALL_SHAPES = [[64, 64], [64, 256]]
RELEASED_MODELS = [("150m", 16), ("1.5b", 8)]
SMALL_MODEL = ModelConfig(
    vocab_size=512,
    context_length=64,
    layers=2,
    width=64,
    heads=2,
    tokens=ParameterTokens(query=64, key=64, value=64, output=64, ffn=256),
    init="published",  # a balanced model starts as the identity, whatever its kernels compute
)


@dataclass(frozen=True, kw_only=True)
class BenchArguments:
    """Keys of bench.yaml."""

    suite: str
    """Name of a suite, a key of `SUITES`."""
    out: str | None
    """CSV file to which rows are appended."""
    fabric: FabricConfig
    """Device and precision."""
    shapes: list[list[int]] | None
    """(D, N) of the layers; null: those of the released models, on a CPU small ones."""
    tokens: int | None
    """Number of input tokens of a layer; null: 16384, on a CPU 256."""
    models: list[str] | None
    """Presets to train or decode; null: the released ones, on a CPU a small one."""
    batches: list[int] | None
    """Sequences per step, for each model; null: 16 and 8, on a CPU 2."""
    peers: list[str] | None
    """Baselines of suite=step; null: all."""
    data: dict[str, Any]
    """Text of suite=data; its keys depend on `data.source`."""
    tokenizer: dict[str, Any]
    """Tokenizer section of suite=data."""

    def __post_init__(self) -> None:
        if self.suite not in SUITES:
            raise UserError(f"Unknown suite={self.suite}. {suggest(self.suite, list(SUITES))}")
        if self.suite == "step" and bool(self.batches) != bool(self.models):
            raise UserError("models and batches must both be set, or neither. Set the other one.")
        if self.batches and self.models and len(self.batches) != len(self.models):
            raise UserError(
                f"batches must have one entry per model ({len(self.models)}), got "
                f"{len(self.batches)}."
            )
        if self.peers and self.suite != "step":
            raise UserError(
                f"peers must be null with suite={self.suite}; only suite=step has peers. Remove it."
            )
        for peer in self.peers or []:
            if peer not in step.PEERS:
                raise UserError(f"Unknown peer {peer!r}. {suggest(peer, list(step.PEERS))}")
        sizes = [*(self.batches or []), *(n for shape in self.shapes or [] for n in shape)]
        if min([*sizes, 1 if self.tokens is None else self.tokens]) < 1:
            raise UserError("shapes, tokens and batches must be above 0.")
        if any(len(shape) != 2 for shape in self.shapes or []):
            raise UserError(f"shapes must be pairs [D, N], got {self.shapes}.")

    @property
    def device(self) -> torch.device:
        """Device of the measurement."""
        return torch.device("cuda" if self.fabric.on_gpu else "cpu")

    @property
    def cases(self) -> list[tuple[str, ModelConfig, int]]:
        """Name, model config and batch size of each case."""
        if self.models:
            batches = self.batches or [1] * len(self.models)
            pairs = zip(self.models, batches, strict=True)
            return [(name, ModelConfig.preset(name), batch) for name, batch in pairs]
        if self.fabric.on_gpu:
            return [(name, ModelConfig.preset(name), batch) for name, batch in RELEASED_MODELS]
        return [("small", SMALL_MODEL, 2)]


def main(config: DictConfig) -> None:
    """Measure a suite; print a table, and append rows to `out`."""
    arguments = parse_dataclass(BenchArguments, plain_values(config))
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
    small_shapes = arguments.suite != "data" and not arguments.fabric.on_gpu
    small = "" if not small_shapes else " (small shapes, not comparable with a GPU)"
    console.print(
        f"on {rows[0].device}, {rows[0].dtype}, torch {rows[0].torch_version}{small}",
        soft_wrap=True,
    )
    if out:
        console.print(f"rows: {out}", soft_wrap=True)


def _rows(arguments: BenchArguments) -> Iterator[Measurement]:
    if arguments.suite == "data":
        return _data_rows(arguments)
    fabric, device = arguments.fabric, arguments.device
    dtype = torch.float32 if fabric.chosen_precision == "32-true" else torch.bfloat16
    if arguments.suite == "step":
        return step.measure(arguments.cases, fabric, arguments.peers or list(step.PEERS))
    if arguments.suite == "decode":
        return decode.measure([case[:2] for case in arguments.cases], dtype, device)
    shapes = arguments.shapes or (RELEASED_SHAPES if fabric.on_gpu else SMALL_SHAPES)
    tokens = arguments.tokens or (16384 if fabric.on_gpu else 256)
    return pattention.measure([(d, n) for d, n in shapes], tokens, dtype, device)


def _data_rows(arguments: BenchArguments) -> Iterator[Measurement]:
    corpus = resolve_corpus(arguments.data)
    tokenizer = prepare_tokenizer(resolve_tokenizer(arguments.tokenizer), corpus, cache_dir())
    cache_dir().mkdir(parents=True, exist_ok=True)
    return data.measure(corpus, tokenizer, cache_dir())


def _table(suite: str, rows: list[Measurement]) -> Table:
    """Return the table, with a section per case."""
    title, against = SUITES[suite]
    last = "rate" if suite == "data" else "peak\nGB"
    made = empty_table(title, "", ("median\nms", "p20", "p80", against, last))
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
    last = f"{row.peak_gb:.2f}" if row.peak_gb else "-"
    if row.unit:
        last = f"{row.rate:,.4g} {row.unit}"
    times = (f"{time:.3f}" for time in (row.median_ms, row.p20_ms, row.p80_ms))
    return [*times, f"{row.against_limit:.3f}", last]


if __name__ == "__main__":
    run_command("bench", main)
