"""Which sequences make up which batch: pure index maths, a function of (seed, global batch number).

Nothing here has state, so a run that is killed, or moved to another number of ranks, finds its
place from one integer.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import floor

import numpy as np

BLOCK = 2**14
"""Positions in which the sources of a mixture have their exact shares."""
_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def shuffled(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """A pseudo-random permutation of ``range(size)``, evaluated at ``indices``.

    A Feistel network permutes the numbers below the next even power of two, and a number that lands
    outside the range is sent through again until it is inside (cycle walking; fewer than 4 times on
    average). It takes no table: an epoch of 150 million sequences would need 1.2 GB of one on every
    rank, and again after every restart.

    Args:
        indices: int64 [n], each in ``range(size)``.
        size: how many numbers are permuted, at least 1.
        key: picks the permutation, any integer.

    Returns:
        int64 [n]; distinct indices give distinct numbers in ``range(size)``.
    """
    assert size >= 1 and (indices.size == 0 or 0 <= indices.min() <= indices.max() < size)
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    round_keys = _mix(np.arange(_ROUNDS, dtype=np.uint64) * _GOLDEN + _wrapped(key))
    values = _feistel(indices.astype(np.uint64), half_bits, round_keys)
    while (outside := np.flatnonzero(values >= size)).size:
        values[outside] = _feistel(values[outside], half_bits, round_keys)
    return values.astype(np.int64)


def batch_indices(seed: int, batch: int, batch_size: int, num_sequences: int) -> np.ndarray:
    """The sequences of a global batch.

    Batch number ``batch`` covers the positions from ``batch * batch_size`` on in an endless
    stream of epochs. Every epoch visits every sequence once, in an order of its own; a batch
    may lie across the border of two epochs.

    Args:
        seed: picks the order, any integer.
        batch: number of the global batch, from 0.
        batch_size: sequences in a global batch.
        num_sequences: sequences in the split, at least 1.

    Returns:
        int64 [batch_size], each in ``range(num_sequences)``.
    """
    return _in_epochs(seed, _positions(batch, batch_size), num_sequences)


def apportion(total: int, weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in proportion to weights, by the largest remainders.

    Args:
        total: what they add up to.
        weights: above 0, in any unit.
    """
    exact = [Fraction(weight) for weight in weights]
    shares = [weight * total / sum(exact) for weight in exact]
    parts = [floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: parts[i] - shares[i])
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return tuple(parts)


def mixed_indices(
    seed: int, batch: int, batch_size: int, quotas: tuple[int, ...], num_sequences: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The sequences of a global batch of a mixture.

    The endless stream is cut into blocks of `BLOCK` positions, and which position of a block is
    whose is shuffled anew in every block. The positions of one source, in their order, go through
    its epochs as `batch_indices` does.

    Args:
        seed: picks the order, any integer.
        batch: number of the global batch, from 0.
        batch_size: sequences in a global batch.
        quotas: positions of each source in a block, `BLOCK` in all.
        num_sequences: sequences of each source, at least 1.

    Returns:
        (source, sequence in it), int64 [batch_size] each.
    """
    positions = _positions(batch, batch_size)
    blocks, places = np.divmod(positions, BLOCK)
    sources, visits = np.empty_like(positions), np.empty_like(positions)
    for block in np.unique(blocks):
        inside = blocks == block
        whose, rank = _shuffled_block(seed, int(block), quotas)
        sources[inside] = whose[places[inside]]
        visits[inside] = block * np.array(quotas)[sources[inside]] + rank[places[inside]]
    indices = np.empty_like(positions)
    for source in np.unique(sources):
        inside = sources == source
        own_seed = _key(seed, int(source))
        indices[inside] = _in_epochs(own_seed, visits[inside], num_sequences[source])
    return sources, indices


@lru_cache(maxsize=2)  # a batch may lie across two; the next batch has most of the same
def _shuffled_block(
    seed: int, block: int, quotas: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """(source of each position of a block, how many before it have the same), int64 [BLOCK]."""
    order = shuffled(np.arange(BLOCK), BLOCK, _key(_key(seed, -1), block))
    sources = np.repeat(np.arange(len(quotas)), quotas)[order]
    ranks = np.empty_like(sources)
    for source, quota in enumerate(quotas):
        ranks[sources == source] = np.arange(quota)
    return sources, ranks


def _positions(batch: int, batch_size: int) -> np.ndarray:
    """Of a global batch in the endless stream, int64 [batch_size]."""
    return np.arange(batch * batch_size, (batch + 1) * batch_size, dtype=np.int64)


def _in_epochs(seed: int, positions: np.ndarray, num_sequences: int) -> np.ndarray:
    """The sequences at some positions of an endless stream of epochs, int64 [n] -> int64 [n]."""
    epochs, places = np.divmod(positions, num_sequences)
    result = np.empty_like(positions)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        result[inside] = shuffled(places[inside], num_sequences, _key(seed, int(epoch)))
    return result


def _key(seed: int, number: int) -> int:
    """One key for each (seed, number); mixed in turn, so that (0, 1) and (1, 0) differ."""
    return int(_mix(_mix(_wrapped(seed)) + _wrapped(number))[0])


def _feistel(values: np.ndarray, half_bits: np.uint64, round_keys: np.ndarray) -> np.ndarray:
    """Permutes the numbers below ``4 ** half_bits``: uint64 [n] -> uint64 [n].

    A round replaces (left, right) by (right, left ^ hash(right)), which can be undone whatever the
    hash is: that is what makes the whole a permutation.
    """
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return (left << half_bits) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64: every input bit reaches every output bit. uint64 [n]."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _wrapped(number: int) -> np.ndarray:
    """Any integer modulo 2**64 as uint64 [1]: arrays overflow in silence, NumPy scalars do not."""
    return np.array([number % 2**64], dtype=np.uint64)
