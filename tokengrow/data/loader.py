"""Sequences to batches, [b, T + 1]: the last T token ids are the targets of the first T."""

from collections.abc import Iterator
from itertools import count

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from tokengrow.data.sequences import Sequences
from tokengrow.errors import UserError


class _MicroBatches(Sampler[list[int]]):
    """One rank's micro-batches of every global batch from ``start_batch`` on, without end."""

    def __init__(
        self, sequences: Sequences, *, seed: int, batch_size: int, micro_batch_size: int,
        start_batch: int, rank: int, world_size: int,
    ) -> None:  # fmt: skip
        self.sequences, self.seed, self.start_batch = sequences, seed, start_batch
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        for number in count(self.start_batch):
            indices = self.sequences.batch(number, self.batch_size, self.seed)
            parts = indices.reshape(-1, self.world_size, self.micro_batch_size)
            yield from parts[:, self.rank].tolist()


def train_loader(
    sequences: Sequences,
    *,
    seed: int,
    batch_size: int,
    micro_batch_size: int,
    start_batch: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> DataLoader[torch.Tensor]:
    """Endless micro-batches, int64 [micro_batch_size, T + 1].

    Global batch number n holds the same sequences in the same order whatever the rest says: it is
    cut into micro-batches, which are dealt to the ranks in turn (as GPT-NeoX does).

    Args:
        sequences: the train split; at least one.
        seed: picks the order.
        batch_size: sequences in a global batch, over all ranks and micro-batches.
        micro_batch_size: sequences that one rank takes at once.
        start_batch: number of the first global batch.
        rank: number of this process.
        world_size: how many processes share the global batches.
        workers: processes that read ahead; 0: read when asked.

    Raises:
        UserError: ``batch_size`` is no multiple of ``micro_batch_size * world_size``.
    """
    if micro_batch_size < 1:
        raise UserError(f"micro_batch_size is {micro_batch_size}: give at least 1")
    if batch_size < 1 or batch_size % (micro_batch_size * world_size):
        raise UserError(
            f"batch_size is {batch_size}: give a multiple of micro_batch_size x processes = "
            f"{micro_batch_size} x {world_size} = {micro_batch_size * world_size}"
        )
    micro_batches = _MicroBatches(
        sequences,
        seed=seed,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        start_batch=start_batch,
        rank=rank,
        world_size=world_size,
    )
    return _loader(sequences, batch_sampler=micro_batches, num_workers=workers)


def validation_loader(
    sequences: Sequences,
    *,
    batch_size: int,
    max_sequences: int,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader[torch.Tensor]:
    """One pass over part of a split in order, int64 [b, T + 1]; the last batch may be smaller.

    The part is spread evenly over the whole split: neighbours come from the same documents, and the
    first few hundred would stand for those alone.

    Each rank takes a contiguous part, all of one size: were one longer, its last batch would wait
    for ever on the collectives of the others. So fewer than ``world_size`` of the last sequences
    may go unused.

    Args:
        sequences: the validation split.
        batch_size: sequences that one rank takes at once.
        max_sequences: how many to read at most, over all ranks.
        rank: number of this process.
        world_size: how many processes share the sequences.

    Raises:
        UserError: a size below 1, or fewer sequences than processes.
    """
    share = min(max_sequences, len(sequences)) // world_size
    if share < 1 or batch_size < 1:
        raise UserError(
            f"validation takes {max_sequences} of {len(sequences)} sequences in batches of "
            f"{batch_size} on {world_size} processes: give each process at least one sequence"
        )
    spread = sequences.spread(share * world_size)
    mine = spread[rank * share : (rank + 1) * share].tolist()
    return _loader(Subset(sequences, mine), batch_size=batch_size)


def spread_batch(sequences: Sequences, count: int) -> torch.Tensor:
    """Sequences spread evenly over a split, int64 [count, T + 1], fewer where there are fewer."""
    indices = sequences.spread(min(count, len(sequences)))
    return torch.stack([sequences[index] for index in indices.tolist()])


def probe_batch(sequences: Sequences, count: int = 2) -> torch.Tensor:
    """The first sequences of a split, int64 [count, T + 1], fewer where there are fewer."""
    return torch.stack([sequences[index] for index in range(min(count, len(sequences)))])


def _loader(dataset: Dataset[torch.Tensor], **options: object) -> DataLoader[torch.Tensor]:
    # Without a generator of its own, a DataLoader draws from PyTorch's global one whenever it
    # starts, and a resumed run would not see the random numbers of an uninterrupted one.
    return DataLoader(
        dataset,
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
        **options,  # type: ignore[arg-type]
    )
