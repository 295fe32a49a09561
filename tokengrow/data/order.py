"""Order of batches: pure index arithmetic on (seed, global batch number), without state.

A run that is killed, or moved to another number of ranks, resumes from one integer.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import floor

import numpy as np

BLOCK_SIZE = 2**14
"""Number of consecutive positions in which the sources of a mixture have their exact shares."""
_FEISTEL_ROUNDS = 8
_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / phi, the increment of SplitMix64


def permute(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """Evaluate a pseudo-random permutation of `range(size)` at `indices`.

    A Feistel network permutes the numbers below the next even power of two. A result outside the
    range is permuted again until it is inside (cycle walking), fewer than 4 times on average. No
    table is needed: for 150 million sequences it would take 1.2 GB on every rank, and would have to
    be computed again after every restart.

    Args:
        indices: int64 [n], each in `range(size)`.
        size: number of permuted integers, at least 1.
        key: any integer; selects the permutation.

    Returns:
        int64 [n]; distinct indices give distinct numbers in `range(size)`.
    """
    assert size >= 1 and (indices.size == 0 or 0 <= indices.min() <= indices.max() < size)
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    round_keys = _splitmix64(
        np.arange(_FEISTEL_ROUNDS, dtype=np.uint64) * _GOLDEN_RATIO + _to_uint64(key)
    )
    values = _feistel(indices.astype(np.uint64), half_bits, round_keys)
    while (outside := np.flatnonzero(values >= size)).size:
        values[outside] = _feistel(values[outside], half_bits, round_keys)
    return values.astype(np.int64)


def batch_indices(seed: int, batch: int, batch_size: int, num_sequences: int) -> np.ndarray:
    """Return the sequences of a global batch.

    Batch number `batch` covers `batch_size` positions from `batch * batch_size` in an endless
    stream of epochs. Every epoch visits every sequence once, in an order of its own. A batch may
    span two epochs.

    Args:
        seed: any integer; selects the order.
        batch: number of the global batch, from 0.
        batch_size: sequences in a global batch.
        num_sequences: sequences in the split, at least 1.

    Returns:
        int64 [batch_size], each in `range(num_sequences)`.
    """
    return _epoch_indices(seed, _batch_positions(batch, batch_size), num_sequences)


def apportion(total: int, weights: Sequence[float]) -> tuple[int, ...]:
    """Divide `total` into integers in proportion to weights, by the largest-remainder method.

    Args:
        total: sum of the result.
        weights: positive numbers in any unit.
    """
    exact = [Fraction(weight) for weight in weights]
    shares = [weight * total / sum(exact) for weight in exact]
    counts = [floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return tuple(counts)


def mixed_batch_indices(
    seed: int, batch: int, batch_size: int, quotas: tuple[int, ...], num_sequences: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sources and sequences of a global batch of a mixture.

    The endless stream is divided into blocks of `BLOCK_SIZE` positions. Every block assigns its
    positions to sources in a shuffled order of its own. The positions of one source, in their
    order, go through the epochs of that source as in `batch_indices`.

    Args:
        seed: any integer; selects the order.
        batch: number of the global batch, from 0.
        batch_size: sequences in a global batch.
        quotas: positions of each source in a block, `BLOCK_SIZE` in total.
        num_sequences: sequences of each source, at least 1.

    Returns:
        (source, sequence in that source), each int64 [batch_size].
    """
    positions = _batch_positions(batch, batch_size)
    blocks, offsets = np.divmod(positions, BLOCK_SIZE)
    sources, visits = np.empty_like(positions), np.empty_like(positions)
    for block in np.unique(blocks):
        in_block = blocks == block
        block_sources, ranks = _shuffled_block(seed, int(block), quotas)
        sources[in_block] = block_sources[offsets[in_block]]
        visits[in_block] = block * np.array(quotas)[sources[in_block]] + ranks[offsets[in_block]]
    indices = np.empty_like(positions)
    for source in np.unique(sources):
        of_source = sources == source
        source_seed = _derive_key(seed, int(source))
        indices[of_source] = _epoch_indices(source_seed, visits[of_source], num_sequences[source])
    return sources, indices


@lru_cache(maxsize=2)  # a batch may span two blocks, and the next batch mostly uses the same ones
def _shuffled_block(
    seed: int, block: int, quotas: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Assign the positions of a block to sources, and rank the positions of each source.

    Returns:
        (source, rank among the positions of that source), each int64 [BLOCK_SIZE].
    """
    order = permute(np.arange(BLOCK_SIZE), BLOCK_SIZE, _derive_key(_derive_key(seed, -1), block))
    sources = np.repeat(np.arange(len(quotas)), quotas)[order]
    ranks = np.empty_like(sources)
    for source, quota in enumerate(quotas):
        ranks[sources == source] = np.arange(quota)
    return sources, ranks


def _batch_positions(batch: int, batch_size: int) -> np.ndarray:
    """Return the positions of a global batch in the endless stream, int64 [batch_size]."""
    return np.arange(batch * batch_size, (batch + 1) * batch_size, dtype=np.int64)


def _epoch_indices(seed: int, positions: np.ndarray, num_sequences: int) -> np.ndarray:
    """Map positions in an endless stream of epochs to sequences, int64 [n] -> int64 [n]."""
    epochs, offsets = np.divmod(positions, num_sequences)
    indices = np.empty_like(positions)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        key = _derive_key(seed, int(epoch))
        indices[in_epoch] = permute(offsets[in_epoch], num_sequences, key)
    return indices


def _derive_key(seed: int, number: int) -> int:
    """Hash (seed, number) to a key; the two are mixed in turn, so (0, 1) and (1, 0) differ."""
    return int(_splitmix64(_splitmix64(_to_uint64(seed)) + _to_uint64(number))[0])


def _feistel(values: np.ndarray, half_bits: np.uint64, round_keys: np.ndarray) -> np.ndarray:
    """Permute the numbers below `4 ** half_bits`: uint64 [n] -> uint64 [n].

    A round replaces (left, right) by (right, left ^ hash(right)). It is invertible for any hash, so
    the composition of all rounds is a permutation.
    """
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for round_key in round_keys:
        left, right = right, left ^ (_splitmix64(right ^ round_key) & mask)
    return (left << half_bits) | right


def _splitmix64(values: np.ndarray) -> np.ndarray:
    """Apply the finalizer of SplitMix64, uint64 [n]: every input bit affects every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


def _to_uint64(number: int) -> np.ndarray:
    """Reduce an integer modulo 2**64 to uint64 [1]: NumPy arrays wrap silently, scalars warn."""
    return np.array([number % 2**64], dtype=np.uint64)
