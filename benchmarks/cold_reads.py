"""Sequences out of a store that is not in the page cache: read at their places, and mapped.

    python -m benchmarks.cold_reads 2000

Writes 0.5 GB of random ids, drops them from the page cache before each way (which needs Linux and a
disk that is not itself memory), and reads sequences at random places. CSV rows on stdout.
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
"""Gives the sequence that starts at a token, int64 [T + 1]."""


def read_at_places(files: list[Path]) -> Read:
    """As tokengrow does."""
    tokens = TokenArray(files, [SHARD_TOKENS] * SHARDS, "<u2")
    return lambda start: tokens.read(start, CONTEXT + 1)


def mapped(files: list[Path], advice: int | None = None) -> Read:
    """Through memory maps, with advice to the kernel."""
    maps = [np.memmap(file, "<u2", "r") for file in files]
    for each in maps:
        if advice is not None:
            each._mmap.madvise(advice)

    def read(start: int) -> np.ndarray:
        shard, offset = divmod(start, SHARD_TOKENS)
        return maps[shard][offset : offset + CONTEXT + 1].astype(np.int64)

    return read


def drop_from_cache(files: list[Path]) -> None:
    """The next read of them goes to the disk."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def number(file: str, name: str) -> int:
    """The value of a line `name: value` in a file of /proc/self."""
    for line in (Path("/proc/self") / file).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise KeyError(name)


def rows(sequences: int) -> Iterator[dict[str, Any]]:
    """Each way over the same places.

    Args:
        sequences: to read, at random places.
    """
    random = np.random.default_rng(0)
    # A sequence lies in one shard; across two, mapping has no short form.
    places = random.integers(0, SHARD_TOKENS // CONTEXT - 1, sequences) * CONTEXT
    starts = (places + SHARD_TOKENS * random.integers(0, SHARDS, sequences)).tolist()
    with TemporaryDirectory(dir=Path.cwd()) as folder:
        files = [Path(folder) / f"{shard}.bin" for shard in range(SHARDS)]
        for file in files:
            random.integers(0, 50304, SHARD_TOKENS, dtype=np.uint16).astype("<u2").tofile(file)
        for name, way in {
            "read at places": lambda: read_at_places(files),
            "mapped, MADV_RANDOM": lambda: mapped(files, mmap.MADV_RANDOM),
            "mapped": lambda: mapped(files),
        }.items():
            drop_from_cache(files)
            from_disk, resident = number("io", "read_bytes"), number("status", "VmRSS")
            read, began = way(), time.perf_counter()
            total = sum(len(read(start)) for start in starts)
            seconds = time.perf_counter() - began
            grown = number("status", "VmRSS") - resident
            del read  # what is mapped stays in the page cache
            yield {
                "way": name,
                "sequences": sequences,
                "asked_mb": round(2 * total / 1e6, 1),
                "from_disk_mb": round((number("io", "read_bytes") - from_disk) / 1e6, 1),
                "resident_grown_mb": round(grown * 1024 / 1e6, 1),
                "m_tokens_per_second": round(CONTEXT * sequences / seconds / 1e6, 2),
                "numpy": np.__version__,
            }


def main() -> None:
    """Measures each way and prints its row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sequences", type=int, help="to read, at random places")
    print_rows(rows(parser.parse_args().sequences))


if __name__ == "__main__":
    main()
