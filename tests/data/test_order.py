"""Tests of the order of batches: epochs are permutations, batches depend on their number."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tokengrow.data.order import BLOCK_SIZE, batch_indices, mixed_batch_indices, permute

KEYS = st.integers(-(2**63), 2**64)
PINNED = [3, 9, 6, 1, 5, 0, 4, 8, 7, 2]
PINNED_LARGE = [102337906, 117361046, 50385629, 39221774]
PINNED_MIXED = [[1, 77268835], [1, 51641905], [0, 3], [0, 2], [0, 6], [0, 1], [0, 5], [0, 0]]
PINNED_MIXED_LATER = [[1, 136682472], [0, 6], [0, 3], [0, 2]]


@given(size=st.integers(1, 3000), key=KEYS)
def test_permute_is_a_permutation(size: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


@given(size=st.integers(1, 2**40), key=KEYS, data=st.data())
def test_permute_maps_each_index_independently(size: int, key: int, data: st.DataObject) -> None:
    indices = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    together = permute(indices, size, key)
    single = np.concatenate([permute(indices[i : i + 1], size, key) for i in range(len(indices))])
    assert np.array_equal(together, single)
    assert together.dtype == np.int64 and together.min() >= 0 and together.max() < size
    assert len(set(together.tolist())) == len(set(indices.tolist()))


@given(
    seed=KEYS,
    num_sequences=st.integers(1, 60),
    batch_size=st.integers(1, 40),
    start=st.integers(0, 20),
)
def test_epoch_visits_every_sequence_once_from_any_start(
    seed: int, num_sequences: int, batch_size: int, start: int
) -> None:
    num_batches = 3 * num_sequences // batch_size + 2
    batches = [batch_indices(seed, b, batch_size, num_sequences) for b in range(num_batches)]
    stream = np.concatenate(batches)
    for epoch in range(2):
        visited = stream[epoch * num_sequences : (epoch + 1) * num_sequences]
        assert sorted(visited) == list(range(num_sequences))
    if start < num_batches:
        again = batch_indices(seed, start, batch_size, num_sequences)
        assert np.array_equal(again, batches[start])


@given(seed=KEYS, batch=st.integers(0, 50), num_sequences=st.integers(1, 100))
def test_two_small_batches_equal_one_large_batch(seed: int, batch: int, num_sequences: int) -> None:
    halves = [batch_indices(seed, 2 * batch + half, 8, num_sequences) for half in range(2)]
    assert np.array_equal(np.concatenate(halves), batch_indices(seed, batch, 16, num_sequences))


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = [batch_indices(seed, epoch, 100, 100) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({order.tobytes() for order in orders}) == 6


def test_order_has_no_pattern() -> None:
    """Check that consecutive indices are n / 3 apart on average, as two random positions are."""
    size = 100_000
    order = permute(np.arange(size), size, key=7)
    assert abs(np.abs(np.diff(order)).mean() / (size / 3) - 1) < 0.01
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.02
    assert np.count_nonzero(order == np.arange(size)) < 10


def test_six_orders_of_three_sequences_are_equally_frequent() -> None:
    orders = [tuple(batch_indices(0, epoch, 3, 3)) for epoch in range(1200)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6 and min(counts) > 140


def test_order_does_not_change_between_releases() -> None:
    """Check that a run resumed by a later version gets the same batches."""
    assert batch_indices(seed=0, batch=0, batch_size=10, num_sequences=10).tolist() == PINNED
    assert batch_indices(seed=1, batch=10**6, batch_size=4, num_sequences=150_000_000).tolist() == (
        PINNED_LARGE
    )
    quotas, lengths = (BLOCK_SIZE * 3 // 4, BLOCK_SIZE // 4), [7, 150_000_000]
    first = mixed_batch_indices(0, 0, 8, quotas, lengths)
    assert np.stack(first, 1).tolist() == PINNED_MIXED
    later = mixed_batch_indices(1, 10**6, 4, quotas, lengths)
    assert np.stack(later, 1).tolist() == PINNED_MIXED_LATER
