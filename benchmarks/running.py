"""Whole training commands, timed: over several devices, and with checkpoints being written.

    python -m benchmarks.running scaling 450m --micro-batch 16 --devices 1 2
    python -m benchmarks.running saving 150m --micro-batch 16 --every 100

`scaling` gives each device the same work (a micro-batch an update), so that efficiency is tokens/s
over devices x tokens/s of one. `saving` runs the same command with and without checkpoints in turn;
its share is the time that they add. What is trained on is the source of the standard library. One
CSV row each on stdout; what is written goes to a temporary folder (TMPDIR) and away.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tokengrow.bench.rows import print_rows

LOG_EVERY = 10
WARM_UP = 2
"""Logged intervals that do not count: in them code is compiled and memory is taken."""


def command(verb: str, *arguments: str, devices: int = 1) -> list[tuple[float, str]]:
    """Runs a verb; its lines, with the second at which each came."""
    launcher = [sys.executable, "-m"]
    if devices > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={devices}", "-m"]
    lines = []
    with subprocess.Popen(
        [*launcher, "tokengrow", verb, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append((time.perf_counter(), line))
    if process.returncode:
        raise SystemExit(f"{verb} {' '.join(arguments)} ended with {process.returncode}")
    return lines


def train(
    where: Path, args: argparse.Namespace, devices: int, *changes: str
) -> list[tuple[float, str]]:
    """One stage of the model, a micro-batch an update on each device."""
    return command(
        "train",
        f"model={args.model}",
        f"store={where / 'store'}",
        f"+stages.only.steps={args.steps}",
        f"batch_size={args.micro_batch * devices}",
        f"micro_batch_size={args.micro_batch}",
        "validation_every=1000000",
        f"validation_sequences={devices}",
        f"log_every={LOG_EVERY}",
        *changes,
        devices=devices,
    )


def tokens_per_second(out: Path) -> float:
    """The median over logged intervals, all devices together."""
    with next(out.glob("logs/version_0/metrics.csv")).open() as file:
        rates = [float(row["tokens_per_second"]) for row in csv.DictReader(file)
                 if row.get("tokens_per_second")]  # fmt: skip
    return median(rates[WARM_UP:])


def scaling(where: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each strategy on each number of devices."""
    rows: list[dict[str, Any]] = []
    alone = 0.0
    for devices in args.devices:
        for strategy in ("ddp", "fsdp2") if devices > 1 else ("single",):
            out = where / f"{strategy}-{devices}"
            train(where, args, devices, f"fabric={strategy}", "checkpoint_every=1000000",
                  f"out={out}", *args.change)  # fmt: skip
            rate = tokens_per_second(out)
            alone = alone or rate / devices
            row = {"strategy": strategy, "devices": devices, "tokens_per_second": round(rate)}
            rows.append(row | {"efficiency": round(rate / devices / alone, 3)})
    return rows


def saving(where: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each repetition, without and with checkpoints in turn."""
    rows = []
    for number in range(args.repeat):
        seconds = {}
        for every in (1000000, args.every):
            out = where / f"{every}-{number}"
            lines = train(where, args, 1, "fabric=single", f"checkpoint_every={every}",
                          f"out={out}", *args.change)  # fmt: skip
            at = {line.split("step ")[1].split("/")[0]: second
                  for second, line in lines if "step " in line and "loss" in line}  # fmt: skip
            # From behind the first interval to behind the last checkpoint but that of the end.
            last = (args.steps - 1) // args.every * args.every + args.every // 2
            seconds[every] = at[str(last)] - at[str(args.every // 2)]
        plain, saved = seconds[1000000], seconds[args.every]
        row = {"every": args.every, "seconds_plain": round(plain, 3)}
        row |= {"seconds_saving": round(saved, 3), "share": round(saved / plain - 1, 4)}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("scaling", "saving"))
    parser.add_argument("model", help="a preset, or a name under conf/model")
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--change", nargs="*", default=[], help="further key=value of train")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        command("data", "data=stdlib", "tokenizer.vocab_size=4096", f"out={where / 'store'}")
        rows = (scaling if args.what == "scaling" else saving)(where, args)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    same = {"model": args.model, "micro_batch": args.micro_batch, "device": device}
    print_rows([same | {"torch": torch.__version__} | row for row in rows])


if __name__ == "__main__":
    main()
