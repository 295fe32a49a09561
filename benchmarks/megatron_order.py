"""Time and memory of computing the published order of samples.

    python -m benchmarks.megatron_order 200_000_000 --epochs 1 --context-length 2048

Lengths are log-normal with a mean of about 1,500 tokens, as in the Pile. The time of the two
shuffles is reported as well: it is a lower bound, because the published order draws one number at a
time. Prints one CSV row to stdout.
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
    """Write random lengths to a file; return them memory-mapped, int32 [documents]."""
    random = np.random.default_rng(0)
    with path.open("wb") as file:
        for start in range(0, documents, 2**22):
            count = min(2**22, documents - start)
            lengths = np.exp(random.normal(6.8, 1.0, count)).astype("<i4") + 1
            file.write(lengths.tobytes())
    return np.memmap(path, "<i4", "r")


def check_order(order: SampleOrder, sizes: np.ndarray, key: OrderKey) -> None:
    """Check that both shuffles are permutations, and the starts of samples in the first chunks."""
    assert (np.bincount(order.doc_idx) == key.epochs).all()
    assert (np.bincount(order.shuffle_idx) == 1).all()
    ends = np.cumsum(sizes[order.doc_idx[: 2**23]], dtype=np.int64)
    starts = order.sample_idx[: ends[-1] // key.context_length].astype(np.int64)
    positions = starts[:, 0]
    tokens = ends[positions] - sizes[order.doc_idx[: 2**23]][positions] + starts[:, 1]
    assert (tokens == np.arange(len(starts)) * key.context_length).all()


def time_shuffles(documents: int, samples: int, seed: int) -> float:
    """Return the seconds that the two shuffles take."""
    random = np.random.RandomState(seed)
    began = time.perf_counter()
    random.shuffle(np.arange(documents, dtype=np.int32))
    random.shuffle(np.arange(samples, dtype=np.uint32))
    return time.perf_counter() - began


def main() -> None:
    """Measure one order and print its row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("documents", type=int)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--context-length", type=int, default=2048)
    args = parser.parse_args()
    with TemporaryDirectory(dir=Path.cwd()) as folder:
        sizes = synthetic_sizes(args.documents, Path(folder) / "sizes")
        tokens = int(sizes.sum(dtype=np.int64))
        key = OrderKey("", 0, args.documents, args.epochs, args.context_length, seed=1234)
        began = time.perf_counter()
        build_order(sizes, key, Path(folder))
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        check_order(SampleOrder.open(Path(folder)), sizes, key)
    samples = num_samples(tokens, args.epochs, args.context_length)
    row = {
        "documents": args.documents,
        "epochs": args.epochs,
        "context_length": args.context_length,
        "tokens": tokens * args.epochs,
        "samples": samples,
        "seconds": round(seconds, 4),
        "shuffles_alone": round(time_shuffles(args.documents * args.epochs, samples, 1234), 4),
        "peak_rss_gb": round(peak / 1e9, 2),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.processor() or platform.machine(),
    }
    # Imported late, because it imports torch, whose memory is not that of the order.
    from tokengrow.bench.rows import print_rows

    print_rows([row])


if __name__ == "__main__":
    main()
