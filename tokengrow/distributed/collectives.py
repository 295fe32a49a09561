"""What ranks hand to each other: whole tensors to rank 0, parts of them back, and what it found.

Rank 0 alone reads, grows and writes checkpoints, so that memory and disk see a model once, however
many ranks there are. Every function here is called on all ranks, in the same order.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

T = TypeVar("T")


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


@dataclass(frozen=True)
class _Failure:
    error: Exception


def broadcast_from_rank0(make: Callable[[], T], share: Callable[[T], T] = lambda made: made) -> T:
    """What rank 0 makes, on every rank; what it raises is raised on every rank.

    Args:
        make: called on rank 0 alone.
        share: what the others get of it: something that can be pickled, without large tensors.

    Returns:
        On rank 0 what was made, elsewhere what is shared of it.
    """
    if world_size() == 1:
        return make()
    made: Any = None
    sent: list[Any] = [None]
    if rank() == 0:
        try:
            made = make()
            sent = [share(made)]
        except Exception as error:
            sent = [_Failure(error)]
    dist.broadcast_object_list(sent)
    if isinstance(sent[0], _Failure):
        raise sent[0].error
    return made if rank() == 0 else sent[0]


def all_gather_object(here: T) -> list[T]:
    """What each rank has, by its number, on every rank.

    Args:
        here: what this one has: something that can be pickled, without large tensors.
    """
    found = [here] * world_size()
    if world_size() > 1:
        dist.all_gather_object(found, here)
    return found


def barrier() -> None:
    """Waits until every rank has come here."""
    if world_size() > 1:
        dist.barrier()


class StopFlag:
    """A question that any rank may say yes to, asked again and again, without waiting for a GPU."""

    def __init__(self) -> None:
        # In a group of its own: the default one of GPUs knows nothing of the CPU.
        self._group = dist.new_group(backend="gloo") if world_size() > 1 else None
        self._flag, self._sent = torch.zeros((), dtype=torch.int32), None

    def any(self, here: bool) -> bool:
        """Whether a rank had said yes by the last time that all were asked.

        Answered while the next answer is on its way, so that nobody waits for the slowest rank.

        Args:
            here: what this rank says.
        """
        if self._group is None:
            return here
        agreed = False
        if self._sent is not None:
            self._sent.wait()
            agreed = bool(self._flag)
        self._flag = torch.tensor(int(here), dtype=torch.int32)
        self._sent = dist.all_reduce(self._flag, dist.ReduceOp.MAX, self._group, async_op=True)
        return agreed


def to_local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory; of one that is not sharded, itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_rows(like: Tensor, rows: Tensor) -> Tensor:
    """Of one number per row of a tensor, [N], those of this rank's rows."""
    if not isinstance(like, DTensor):
        return rows
    # Every rank has all of them: nothing is sent.
    return distribute_tensor(rows, like.device_mesh, like.placements, src_data_rank=None).to_local()


def scatter_from_rank0(like: Tensor, tensor: Tensor | None) -> Tensor:
    """This rank's part of a tensor that rank 0 holds: new, laid out, typed and placed as `like`.

    Args:
        like: on this rank.
        tensor: of the same shape, on rank 0; elsewhere it is not looked at.
    """
    given = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    if rank() == 0:
        assert tensor is not None
        given.copy_(tensor)
    if isinstance(like, DTensor):
        return distribute_tensor(given, like.device_mesh, like.placements)
    if world_size() > 1:
        dist.broadcast(given, 0)
    return given


def copy_to_host(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Copies of whole tensors in the memory of rank 0; on the others nothing.

    From a GPU into pinned memory, at the speed of the bus: training waits for it.

    Args:
        tensors: (name, tensor), sharded or the same on every rank.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors:
        all_of_it = full_tensor(tensor.detach())
        if rank() == 0:
            there = torch.empty_like(all_of_it, device="cpu", pin_memory=all_of_it.is_cuda)
            found[name] = there.copy_(all_of_it, non_blocking=True)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return found


def first_holders(names: Iterable[str]) -> dict[str, int]:
    """The first rank that holds each name, in the same order on every rank.

    Args:
        names: that this rank holds.
    """
    holders: dict[str, int] = {}
    for number, of_rank in enumerate(all_gather_object(list(names))):
        for name in of_rank:
            holders.setdefault(name, number)
    return holders


def gather_to_rank0(tensor: Tensor | None, holder: int, like: Tensor) -> Tensor:
    """A tensor that one rank holds, on rank 0; elsewhere what is there, or `like`.

    Args:
        tensor: on its holder.
        holder: the rank.
        like: of its shape, dtype and device, on rank 0.
    """
    here = like if tensor is None else tensor
    if holder == 0:
        return here
    if rank() == holder:
        dist.send(here.contiguous(), 0)
    elif rank() == 0:
        here = torch.empty_like(like)
        dist.recv(here, holder)
    return here
