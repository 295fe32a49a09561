"""Time of complete training commands: on several devices, and while checkpoints are written.

    python -m benchmarks.running scaling 450m --micro-batch 16 --devices 1 2
    python -m benchmarks.running saving 150m --micro-batch 16 --every 100

`scaling` gives each device the same work, one micro-batch per update. Its efficiency is tokens/s
divided by (devices x tokens/s of one device). `saving` alternates the same command with and without
checkpoints; its share is the time that they add. The training text is the source code of the
standard library. Prints CSV rows to stdout. All files are in a temporary folder (TMPDIR), which is
removed.
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
"""Logged intervals to skip, because code is compiled and memory is allocated in them."""


def run_command(verb: str, *arguments: str, devices: int = 1) -> list[tuple[float, str]]:
    """Run a verb; return (time in seconds, text) of each line of its output."""
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
        raise SystemExit(
            f"{verb} {' '.join(arguments)} failed with exit status {process.returncode}"
        )
    return lines


def train(
    folder: Path, args: argparse.Namespace, devices: int, *changes: str
) -> list[tuple[float, str]]:
    """Train the model for one stage, with one micro-batch per update on each device."""
    return run_command(
        "train",
        f"model={args.model}",
        f"store={folder / 'store'}",
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
    """Return the median over logged intervals, over all devices."""
    with next(out.glob("logs/version_0/metrics.csv")).open() as file:
        rates = [float(row["tokens_per_second"]) for row in csv.DictReader(file)
                 if row.get("tokens_per_second")]  # fmt: skip
    return median(rates[WARM_UP:])


def measure_scaling(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row per strategy and number of devices."""
    rows: list[dict[str, Any]] = []
    single_rate = 0.0
    for devices in args.devices:
        for strategy in ("ddp", "fsdp2") if devices > 1 else ("single",):
            out = folder / f"{strategy}-{devices}"
            train(folder, args, devices, f"fabric={strategy}", "checkpoint_every=1000000",
                  f"out={out}", *args.change)  # fmt: skip
            rate = tokens_per_second(out)
            single_rate = single_rate or rate / devices
            row = {"strategy": strategy, "devices": devices, "tokens_per_second": round(rate)}
            rows.append(row | {"efficiency": round(rate / devices / single_rate, 3)})
    return rows


def measure_saving(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row per repetition, each without and with checkpoints."""
    rows = []
    for number in range(args.repeat):
        seconds = {}
        for every in (1000000, args.every):
            out = folder / f"{every}-{number}"
            lines = train(folder, args, 1, "fabric=single", f"checkpoint_every={every}",
                          f"out={out}", *args.change)  # fmt: skip
            step_times = {line.split("step ")[1].split("/")[0]: second
                  for second, line in lines if "step " in line and "loss" in line}  # fmt: skip
            # From after the first interval to after the last checkpoint before the final one.
            last = (args.steps - 1) // args.every * args.every + args.every // 2
            seconds[every] = step_times[str(last)] - step_times[str(args.every // 2)]
        plain, saved = seconds[1000000], seconds[args.every]
        row = {"every": args.every, "seconds_plain": round(plain, 3)}
        row |= {"seconds_saving": round(saved, 3), "share": round(saved / plain - 1, 4)}
        rows.append(row)
    return rows


def main() -> None:
    """Measure and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("scaling", "saving"))
    parser.add_argument("model", help="a preset, or a name under conf/model")
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument(
        "--change", nargs="*", default=[], help="additional key=value arguments of train"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run_command("data", "data=stdlib", "tokenizer.vocab_size=4096", f"out={folder / 'store'}")
        measure = measure_scaling if args.what == "scaling" else measure_saving
        rows = measure(folder, args)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    setup = {"model": args.model, "micro_batch": args.micro_batch, "device": device}
    print_rows([setup | {"torch": torch.__version__} | row for row in rows])


if __name__ == "__main__":
    main()
