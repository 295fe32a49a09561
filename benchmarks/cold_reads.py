"""Random reads of sequences from a store outside the page cache: pread and memory maps.

    python -m benchmarks.cold_reads 2000

Writes 0.5 GB of random ids, drops them from the page cache before each method, and reads sequences
at random positions. Needs Linux and a disk that is not in memory. Prints CSV rows to stdout.
"""

import argparse
import mmap
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tokengrow.bench.rows import print_rows
from tokengrow.data.sequences import TokenArray

SHARD_TOKENS, SHARDS, CONTEXT = 2**26, 4, 2048

Read = Callable[[int], np.ndarray]
"""Function from the first token of a sequence to its ids, int64 [T + 1]."""


def pread_reader(files: list[Path]) -> Read:
    """Return a reader that uses `TokenArray`, as training does."""
    tokens = TokenArray(files, [SHARD_TOKENS] * SHARDS, "<u2")
    return lambda start: tokens.read(start, CONTEXT + 1)


def mapped_reader(files: list[Path], advice: int | None = None) -> Read:
    """Return a reader that uses memory maps, with optional advice to the kernel."""
    maps = [np.memmap(file, "<u2", "r") for file in files]
    for array in maps:
        if advice is not None:
            array._mmap.madvise(advice)

    def read(start: int) -> np.ndarray:
        shard, offset = divmod(start, SHARD_TOKENS)
        return maps[shard][offset : offset + CONTEXT + 1].astype(np.int64)

    return read


def drop_from_cache(files: list[Path]) -> None:
    """Drop files from the page cache, so that the next read goes to the disk."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def proc_value(file: str, name: str) -> int:
    """Return the value of a line `name: value` in a file of /proc/self."""
    for line in (Path("/proc/self") / file).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise KeyError(name)


def rows(sequences: int) -> Iterator[dict[str, Any]]:
    """Yield one row per method, for the same positions.

    Args:
        sequences: number of sequences to read at random positions.
    """
    random = np.random.default_rng(0)
    # Each sequence is in one shard, because a memory map cannot read across shards in one slice.
    offsets = random.integers(0, SHARD_TOKENS // CONTEXT - 1, sequences) * CONTEXT
    starts = (offsets + SHARD_TOKENS * random.integers(0, SHARDS, sequences)).tolist()
    with TemporaryDirectory(dir=Path.cwd()) as folder:
        files = [Path(folder) / f"{shard}.bin" for shard in range(SHARDS)]
        for file in files:
            random.integers(0, 50304, SHARD_TOKENS, dtype=np.uint16).astype("<u2").tofile(file)
        for name, make_reader in {
            "read at places": lambda: pread_reader(files),
            "mapped, MADV_RANDOM": lambda: mapped_reader(files, mmap.MADV_RANDOM),
            "mapped": lambda: mapped_reader(files),
        }.items():
            drop_from_cache(files)
            from_disk, resident = proc_value("io", "read_bytes"), proc_value("status", "VmRSS")
            read, began = make_reader(), time.perf_counter()
            total = sum(len(read(start)) for start in starts)
            seconds = time.perf_counter() - began
            grown = proc_value("status", "VmRSS") - resident
            del read  # mapped pages cannot be dropped from the page cache
            yield {
                "way": name,
                "sequences": sequences,
                "asked_mb": round(2 * total / 1e6, 1),
                "from_disk_mb": round((proc_value("io", "read_bytes") - from_disk) / 1e6, 1),
                "resident_grown_mb": round(grown * 1024 / 1e6, 1),
                "m_tokens_per_second": round(CONTEXT * sequences / seconds / 1e6, 2),
                "numpy": np.__version__,
            }


def main() -> None:
    """Measure each method and print its row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "sequences", type=int, help="number of sequences to read at random positions"
    )
    print_rows(rows(parser.parse_args().sequences))


if __name__ == "__main__":
    main()
