"""Tests of sequences, and of loaders whose batches depend only on their number."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokengrow.data.loader import probe_batch, train_loader, validation_loader
from tokengrow.data.order import batch_indices
from tokengrow.data.sequences import Sequences, TokenArray, check_split_length
from tokengrow.errors import UserError

CONTEXT = 4
SIZES = {"seed": 3, "batch_size": 8}


@pytest.fixture
def tokens(tmp_path: Path) -> TokenArray:
    """Token ids 0 to 84 in two shards."""
    np.arange(50, dtype="<u2").tofile(tmp_path / "a.bin")
    np.arange(50, 85, dtype="<u2").tofile(tmp_path / "b.bin")
    return TokenArray([tmp_path / "a.bin", tmp_path / "b.bin"], [50, 35], "<u2")


@pytest.fixture
def sequences(tokens: TokenArray) -> Sequences:
    return Sequences(tokens, CONTEXT)


def first_batches(loader: Iterable[torch.Tensor], count: int) -> torch.Tensor:
    """Return the first batches of a loader, concatenated."""
    return torch.cat(list(islice(loader, count)))


def test_consecutive_sequences_share_one_token(sequences: Sequences) -> None:
    assert len(sequences) == 21  # (85 - 1) // 4
    assert sequences[0].tolist() == [0, 1, 2, 3, 4]
    assert sequences[1].tolist() == [4, 5, 6, 7, 8]
    assert sequences[12].tolist() == [48, 49, 50, 51, 52]  # across the shards
    assert sequences[20].tolist() == [80, 81, 82, 83, 84]
    assert sequences[20].dtype == torch.int64
    with pytest.raises(IndexError):
        sequences[21]


def test_batches_follow_the_order(sequences: Sequences) -> None:
    loader = train_loader(sequences, **SIZES, micro_batch_size=8)
    for number, batch in enumerate(islice(loader, 7)):  # into the third epoch
        assert batch.shape == (8, CONTEXT + 1) and batch.dtype == torch.int64
        expected = batch_indices(3, number, 8, 21) * CONTEXT
        assert batch[:, 0].tolist() == expected.tolist()


def test_micro_batches_are_assigned_to_ranks_in_turn(sequences: Sequences) -> None:
    batches = first_batches(train_loader(sequences, **SIZES, micro_batch_size=8), 3).view(
        3, 2, 2, 2, -1
    )
    for rank in range(2):
        loader = train_loader(sequences, **SIZES, micro_batch_size=2, rank=rank, world_size=2)
        assert torch.equal(first_batches(loader, 6).view(3, 2, 2, -1), batches[:, :, rank])


@given(
    micro_batch_size=st.sampled_from([1, 2, 3, 6]),
    world_size=st.sampled_from([1, 2, 4]),
    parts=st.integers(1, 3),
    start_batch=st.integers(0, 9),
    seed=st.integers(0, 2**64),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_global_batch_is_independent_of_its_division(
    sequences: Sequences, micro_batch_size: int, world_size: int, parts: int, start_batch: int,
    seed: int,
) -> None:  # fmt: skip
    """Concatenate the micro-batches of all ranks, in order, to the global batch."""
    batch_size = micro_batch_size * world_size * parts
    sizes = {"seed": seed, "batch_size": batch_size, "start_batch": start_batch}
    (batch,) = islice(train_loader(sequences, **sizes, micro_batch_size=batch_size), 1)
    ranks = [
        first_batches(
            train_loader(
                sequences, **sizes, micro_batch_size=micro_batch_size, rank=rank,
                world_size=world_size,
            ),
            parts,
        ).view(parts, micro_batch_size, -1)
        for rank in range(world_size)
    ]  # fmt: skip
    assert torch.equal(torch.stack(ranks, 1).view_as(batch), batch)
    numbers = range(start_batch * batch_size, (start_batch + 1) * batch_size)
    single = [batch_indices(seed, number, 1, len(sequences)).item() for number in numbers]
    assert batch[:, 0].tolist() == [CONTEXT * index for index in single]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_batches_of_any_rank(sequences: Sequences, workers: int) -> None:
    rank = {"micro_batch_size": 2, "rank": 1, "world_size": 2, "start_batch": 4}
    expected = first_batches(train_loader(sequences, **SIZES, **rank), 10)
    assert torch.equal(
        first_batches(train_loader(sequences, **SIZES, **rank, workers=workers), 10), expected
    )


def test_start_batch_resumes_order(sequences: Sequences) -> None:
    batches = first_batches(train_loader(sequences, **SIZES, micro_batch_size=4), 20)
    resumed = train_loader(sequences, **SIZES, micro_batch_size=4, start_batch=6)
    assert torch.equal(first_batches(resumed, 8), batches[48:])


def test_loaders_draw_no_global_random_numbers(sequences: Sequences) -> None:
    before = torch.get_rng_state()
    first_batches(train_loader(sequences, **SIZES, micro_batch_size=8), 2)
    list(validation_loader(sequences, batch_size=4, max_sequences=8))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("micro_batch_size", "world_size"), [(3, 1), (4, 3), (8, 2), (16, 1)])
def test_indivisible_batch_is_rejected(
    sequences: Sequences, micro_batch_size: int, world_size: int
) -> None:
    with pytest.raises(
        UserError, match=r"batch_size must be a multiple of micro_batch_size .*, got 8\."
    ):
        train_loader(sequences, **SIZES, micro_batch_size=micro_batch_size, world_size=world_size)


def test_validation_sequences_are_evenly_spaced_over_split(sequences: Sequences) -> None:
    batches = list(validation_loader(sequences, batch_size=4, max_sequences=10))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert torch.cat(batches)[:, 0].tolist() == [CONTEXT * i for i in range(0, 20, 2)]
    full = validation_loader(sequences, batch_size=4, max_sequences=1000)
    assert sum(len(batch) for batch in full) == 21


def test_every_rank_has_equally_many_validation_batches(sequences: Sequences) -> None:
    loaders = [
        validation_loader(sequences, batch_size=3, max_sequences=21, rank=rank, world_size=2)
        for rank in range(2)
    ]
    parts = [torch.cat(list(loader))[:, 0] for loader in loaders]
    assert [len(list(loader)) for loader in loaders] == [4, 4]
    assert torch.cat(parts).tolist() == [CONTEXT * i for i in range(20)]


def test_validation_needs_one_sequence_per_rank(sequences: Sequences) -> None:
    with pytest.raises(
        UserError, match="must have at least one sequence for each process, got 3 of 21"
    ):
        validation_loader(sequences, batch_size=1, max_sequences=3, world_size=4)


def test_split_shorter_than_one_sequence_is_rejected(tokens: TokenArray) -> None:
    check_split_length(len(tokens), 84, "train")
    assert len(Sequences(tokens, 84)) == 1
    message = r"model.context_length \+ 1 = 86 tokens in its validation split, got 85 tokens"
    with pytest.raises(UserError, match=message):
        check_split_length(len(tokens), 85, "validation")


def test_probe_is_first_sequences(tokens: TokenArray) -> None:
    assert probe_batch(Sequences(tokens, 2))[:, 0].tolist() == [0, 2]
    assert probe_batch(Sequences(tokens, 84)).shape == (1, 85)
