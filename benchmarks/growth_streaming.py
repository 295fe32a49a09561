"""Time and memory of a growth from disk to disk, with optimizer state, at a published size.

    python -m benchmarks.growth_streaming                   900m to 1.5b; needs 48 GB of disk
    python -m benchmarks.growth_streaming 150m 450m         smaller

The source has random weights and moments in float32. There are three parts: the growth without its
verification, the verification, and `tokengrow grow`. Each part runs in a separate process, so that
its peak memory is measured separately. Prints one CSV row per part to stdout. The files are in a
temporary folder (TMPDIR), which is removed.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokengrow.bench.rows import print_rows
from tokengrow.checkpoint import layout
from tokengrow.checkpoint.schema import TrainState
from tokengrow.checkpoint.store import Checkpoint, load_checkpoint, write_records
from tokengrow.checkpoint.tensors import TensorFile, stream_tensors
from tokengrow.files import atomic_directory
from tokengrow.growth.checkpoint import grow_checkpoint_on_disk
from tokengrow.growth.engine import grow_weights, verify_growth
from tokengrow.growth.moments import grow_optimizer_state
from tokengrow.growth.plan import plan_growth
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import weight_shapes

PARTS = ("weights and moments", "verification", "all, as tokengrow grow")


def random_checkpoint(folder: Path, config: ModelConfig) -> None:
    """Write a random checkpoint with Adam's state, tensor by tensor."""
    generator, shapes = torch.Generator().manual_seed(0), weight_shapes(config)

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            base = 1.0 if name == "final_norm.weight" else 0.0
            yield name, base + 0.06 * torch.randn(shape, generator=generator)

    def moments() -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            yield f"exp_avg.{name}", 1e-4 * torch.randn(shape, generator=generator)
            yield f"exp_avg_sq.{name}", 1e-6 * torch.rand(shape, generator=generator)
            yield f"step.{name}", torch.tensor(1000.0)

    with atomic_directory(folder, layout.write_marker) as partial:
        stream_tensors(partial / layout.WEIGHTS, weights(), len(shapes))
        stream_tensors(partial / layout.OPTIMIZER, moments(), 3 * len(shapes))
        write_records(partial, Checkpoint(config, {}, train_state=TrainState("", step=1000)))


def measure(part: str, work: Path, target: str) -> dict[str, Any]:
    """Run one part; return its duration and the peak memory of this process."""
    began = time.perf_counter()
    grown = work / "grown"
    source = load_checkpoint(work / "source", streamed=True)
    plan = plan_growth(source.config, ModelConfig.preset(target))
    count = len(weight_shapes(plan.target))
    if part == PARTS[0]:
        grown.mkdir()
        stream_tensors(grown / layout.WEIGHTS, grow_weights(plan, source.weights), count)
        moments = grow_optimizer_state(plan, source.optimizer)
        stream_tensors(grown / layout.OPTIMIZER, moments, 5 * count)
    elif part == PARTS[1]:
        verify_growth(plan, source.weights, TensorFile(grown / layout.WEIGHTS))
    else:
        grow_checkpoint_on_disk(source, plan, work / "again")
    sizes = [file.stat().st_size for file in grown.iterdir()]
    return {
        "part": part,
        "parameters_before": source.config.num_parameters(),
        "parameters_after": plan.target.num_parameters(),
        "disk_gb": round(sum(sizes) / 1e9, 1),
        "seconds": round(time.perf_counter() - began),
        "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }


def main() -> None:
    """Print the rows, or that of one part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", nargs="?", default="900m")
    parser.add_argument("target", nargs="?", default="1.5b")
    parser.add_argument(
        "--part", choices=PARTS, help="run one part in this process, in the folder --work"
    )
    parser.add_argument("--work", type=Path)
    chosen = parser.parse_args()
    if chosen.part:
        print(json.dumps(measure(chosen.part, chosen.work, chosen.target)))
        return
    with tempfile.TemporaryDirectory() as folder:
        random_checkpoint(Path(folder) / "source", ModelConfig.preset(chosen.source))
        command = [sys.executable, "-m", "benchmarks.growth_streaming", chosen.source]
        command += [chosen.target, "--work", folder, "--part"]
        print_rows(
            json.loads(subprocess.check_output([*command, part], text=True)) for part in PARTS
        )


if __name__ == "__main__":
    main()
