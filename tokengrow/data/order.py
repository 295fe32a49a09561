"""Which sequences make up which batch: pure index maths, a function of (seed, global batch number).

Nothing here has state, so a run that is killed, or moved to another number of ranks, finds its
place from one integer.
"""

import numpy as np

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
    positions = np.arange(batch * batch_size, (batch + 1) * batch_size, dtype=np.int64)
    epochs, places = np.divmod(positions, num_sequences)
    result = np.empty_like(positions)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        result[inside] = shuffled(places[inside], num_sequences, _epoch_key(seed, int(epoch)))
    return result


def _epoch_key(seed: int, epoch: int) -> int:
    """One key for each (seed, epoch); mixed in turn, so that (0, 1) and (1, 0) differ."""
    return int(_mix(_mix(_wrapped(seed)) + _wrapped(epoch))[0])


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
