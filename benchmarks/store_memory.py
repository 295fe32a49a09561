"""One epoch over a token store that is larger than the memory limit of the process.

    python -m benchmarks.store_memory 32 --headroom 256

The store is a sparse file: it takes no disk space, but as much of the page cache as any other.
After all imports, the address space of the process is limited to its current size plus `--headroom`
MB, so that a memory map of the store would fail. Prints one CSV row to stdout.
"""

import argparse
import os
import platform
import resource
import time
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tokengrow.bench.rows import print_rows
from tokengrow.data.loader import train_loader
from tokengrow.data.sequences import Sequences, TokenArray

SHARD_TOKENS = 2**26
CONTEXT, MICRO_BATCH, BATCH = 2048, 16, 512


def sparse_store(tokens: int, folder: Path) -> TokenArray:
    """Write sparse shards of zeros, which take no disk space."""
    lengths = [min(SHARD_TOKENS, tokens - start) for start in range(0, tokens, SHARD_TOKENS)]
    files = [folder / f"train_{number:05d}.bin" for number in range(len(lengths))]
    for file, length in zip(files, lengths, strict=True):
        with file.open("wb") as shard:
            shard.truncate(2 * length)
    return TokenArray(files, lengths, "<u2", vocab_size=50304)


def memory(name: str) -> int:
    """Return VmSize (address space) or VmRSS (resident memory) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def main() -> None:
    """Read one epoch and print its row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gigabytes", type=float, help="size of the store")
    parser.add_argument(
        "--headroom",
        "--room",
        type=float,
        default=256,
        help="memory in MB that may be allocated in addition",
    )
    args = parser.parse_args()
    with TemporaryDirectory(dir=Path.cwd()) as folder:
        tokens = sparse_store(int(args.gigabytes * 1e9) // 2, Path(folder))
        sequences = Sequences(tokens, CONTEXT)
        batches = len(sequences) // MICRO_BATCH
        loader = train_loader(sequences, seed=0, batch_size=BATCH, micro_batch_size=MICRO_BATCH)
        next(iter(loader))  # allocate what is allocated only once
        size, resident = memory("VmSize"), memory("VmRSS")
        limit = size + int(args.headroom * 1e6)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        peak, began, seen = resident, time.perf_counter(), 0
        for number, batch in enumerate(islice(loader, batches)):
            seen += batch.shape[0] * CONTEXT
            if number % 1000 == 0:
                peak = max(peak, memory("VmRSS"))
        seconds = time.perf_counter() - began
    row = {
        "store_gb": args.gigabytes,
        "machine_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "room_mb": args.headroom,
        "resident_mb": round(resident / 1e6),
        "grown_mb": round((peak - resident) / 1e6, 1),
        "tokens": seen,
        "m_tokens_per_second": round(seen / seconds / 1e6, 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.processor() or platform.machine(),
    }
    print_rows([row])


if __name__ == "__main__":
    main()
