"""Data loaders of batches [b, T + 1]: the last T token ids are the targets of the first T."""

from collections.abc import Iterator
from itertools import count

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from tokengrow.data.sequences import Sequences
from tokengrow.errors import UserError


class _MicroBatches(Sampler[list[int]]):
    """Endless micro-batches of one rank, from global batch `start_batch`."""

    def __init__(
        self, sequences: Sequences, *, seed: int, batch_size: int, micro_batch_size: int,
        start_batch: int, rank: int, world_size: int,
    ) -> None:  # fmt: skip
        self.sequences, self.seed, self.start_batch = sequences, seed, start_batch
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        for number in count(self.start_batch):
            indices = self.sequences.batch_indices(number, self.batch_size, self.seed)
            micro_batches = indices.reshape(-1, self.world_size, self.micro_batch_size)
            yield from micro_batches[:, self.rank].tolist()


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
    """Return a loader of endless micro-batches, int64 [micro_batch_size, T + 1].

    Global batch n holds the same sequences in the same order for all values of the other arguments.
    It is divided into micro-batches, which are assigned to the ranks in turn (as in GPT-NeoX).

    Args:
        sequences: the train split, with at least one sequence.
        seed: selects the order.
        batch_size: sequences in a global batch, over all ranks and micro-batches.
        micro_batch_size: sequences in a micro-batch of one rank.
        start_batch: number of the first global batch.
        rank: index of this process.
        world_size: number of processes that share the global batches.
        workers: number of processes that prefetch; 0: read in this process, on demand.

    Raises:
        UserError: `batch_size` is not a multiple of `micro_batch_size * world_size`.
    """
    if micro_batch_size < 1:
        raise UserError(f"micro_batch_size must be at least 1, got {micro_batch_size}.")
    if batch_size < 1 or batch_size % (micro_batch_size * world_size):
        raise UserError(
            f"batch_size must be a multiple of micro_batch_size x processes = {micro_batch_size} x "
            f"{world_size} = {micro_batch_size * world_size}, got {batch_size}."
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
    """Return a loader of one pass over part of a split in order, int64 [b, T + 1].

    The part is evenly spaced over the full split. Consecutive sequences come from the same
    documents, so the first few hundred would represent only these. The last batch may be smaller.

    Each rank reads a contiguous part, and all parts have the same size: the last batch of a longer
    one would wait for ever on the collectives of the other ranks. Up to `world_size - 1` sequences
    at the end may therefore be unused.

    Args:
        sequences: the validation split.
        batch_size: sequences in a batch of one rank.
        max_sequences: maximum number of sequences to read, over all ranks.
        rank: index of this process.
        world_size: number of processes that share the sequences.

    Raises:
        UserError: a size is less than 1, or there are fewer sequences than processes.
    """
    per_rank = min(max_sequences, len(sequences)) // world_size
    if per_rank < 1 or batch_size < 1:
        raise UserError(
            "Validation must have at least one sequence for each process, got "
            f"{max_sequences} of {len(sequences)} sequences in batches of {batch_size} on "
            f"{world_size} processes."
        )
    indices = sequences.evenly_spaced(per_rank * world_size)
    rank_indices = indices[rank * per_rank : (rank + 1) * per_rank].tolist()
    return _loader(Subset(sequences, rank_indices), batch_size=batch_size)


def evenly_spaced_batch(sequences: Sequences, count: int) -> torch.Tensor:
    """Return sequences at even distances over a split, int64 [count, T + 1].

    The result has fewer than `count` sequences if the split has.
    """
    indices = sequences.evenly_spaced(min(count, len(sequences)))
    return torch.stack([sequences[index] for index in indices.tolist()])


def probe_batch(sequences: Sequences, count: int = 2) -> torch.Tensor:
    """Return the first sequences of a split, int64 [count, T + 1], fewer if the split has fewer."""
    return torch.stack([sequences[index] for index in range(min(count, len(sequences)))])


def _loader(dataset: Dataset[torch.Tensor], **options: object) -> DataLoader[torch.Tensor]:
    """Return a loader that draws no numbers from the global random generator.

    Without a generator of its own, a DataLoader draws from the global one whenever it starts. A
    resumed run would then get other random numbers than an uninterrupted one.
    """
    return DataLoader(
        dataset,
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
        **options,  # type: ignore[arg-type]
    )
