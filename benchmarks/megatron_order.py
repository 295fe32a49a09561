"""How long the published order of samples takes to compute, and how much memory.

    python -m benchmarks.megatron_order 200_000_000 --epochs 1 --context-length 2048

Lengths are log-normal with a mean of about 1,500 tokens, as in the Pile. Beside the whole stand its
two shuffles, the floor: the published order draws them one number at a time. One CSV row on stdout.
"""

import argparse
import platform
import resource
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from tokengrow.data.megatron_order import OrderKey, SampleOrder, build_order, num_samples


def synthetic_sizes(documents: int, path: Path) -> np.ndarray:
    """int32 [documents] lengths in a file, memory-mapped."""
    random = np.random.default_rng(0)
    with path.open("wb") as file:
        for at in range(0, documents, 2**22):
            count = min(2**22, documents - at)
            lengths = np.exp(random.normal(6.8, 1.0, count)).astype("<i4") + 1
            file.write(lengths.tobytes())
    return np.memmap(path, "<i4", "r")


def check(order: SampleOrder, sizes: np.ndarray, key: OrderKey) -> None:
    """Asserts that both shuffles are permutations, and where samples begin in the first chunks."""
    assert (np.bincount(order.doc_idx) == key.epochs).all()
    assert (np.bincount(order.shuffle_idx) == 1).all()
    ends = np.cumsum(sizes[order.doc_idx[: 2**23]], dtype=np.int64)
    starts = order.sample_idx[: ends[-1] // key.context_length].astype(np.int64)
    places = starts[:, 0]
    found = ends[places] - sizes[order.doc_idx[: 2**23]][places] + starts[:, 1]
    assert (found == np.arange(len(starts)) * key.context_length).all()


def floor(documents: int, samples: int, seed: int) -> float:
    """Seconds of the two shuffles alone."""
    random = np.random.RandomState(seed)
    began = time.perf_counter()
    random.shuffle(np.arange(documents, dtype=np.int32))
    random.shuffle(np.arange(samples, dtype=np.uint32))
    return time.perf_counter() - began


def main() -> None:
    """Measures one order and prints its row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("documents", type=int)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--context-length", type=int, default=2048)
    chosen = parser.parse_args()
    with TemporaryDirectory(dir=Path.cwd()) as folder:
        sizes = synthetic_sizes(chosen.documents, Path(folder) / "sizes")
        tokens = int(sizes.sum(dtype=np.int64))
        key = OrderKey("", 0, chosen.documents, chosen.epochs, chosen.context_length, seed=1234)
        began = time.perf_counter()
        build_order(sizes, key, Path(folder))
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        check(SampleOrder.open(Path(folder)), sizes, key)
    samples = num_samples(tokens, chosen.epochs, chosen.context_length)
    row = {
        "documents": chosen.documents,
        "epochs": chosen.epochs,
        "context_length": chosen.context_length,
        "tokens": tokens * chosen.epochs,
        "samples": samples,
        "seconds": round(seconds, 4),
        "shuffles_alone": round(floor(chosen.documents * chosen.epochs, samples, 1234), 4),
        "peak_rss_gb": round(peak / 1e9, 2),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.processor() or platform.machine(),
    }
    # Not before: it imports torch, whose memory is not that of the order.
    from tokengrow.bench.rows import print_rows

    print_rows([row])


if __name__ == "__main__":
    main()
