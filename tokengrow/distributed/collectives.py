"""Collectives: broadcast objects from rank 0, scatter shards, gather full tensors to rank 0.

Only rank 0 reads, grows and writes checkpoints, so that memory and disk hold a model once for any
number of ranks. Every function here must be called on all ranks, in the same order.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


@dataclass(frozen=True)
class _Failure:
    """Exception of rank 0, in place of its result."""

    error: Exception


def broadcast_from_rank0(
    make: Callable[[], T], to_send: Callable[[T], T] = lambda result: result
) -> T:
    """Run `make` on rank 0 and broadcast its result or its exception.

    Args:
        make: function of rank 0.
        to_send: part of the result for the other ranks; picklable, without large tensors.

    Returns:
        The result on rank 0, the part of it on the other ranks.

    Raises:
        Exception: `make` raised it on rank 0; every rank raises it.
    """
    if world_size() == 1:
        return make()
    result: Any = None
    message: list[Any] = [None]
    if rank() == 0:
        try:
            result = make()
            message = [to_send(result)]
        except Exception as error:
            message = [_Failure(error)]
    dist.broadcast_object_list(message)
    if isinstance(message[0], _Failure):
        raise message[0].error
    return cast(T, result if rank() == 0 else message[0])


def all_gather_object(obj: T) -> list[T]:
    """Return the objects of all ranks, in the order of ranks.

    Args:
        obj: object of this rank; picklable, without large tensors.
    """
    objects = [obj] * world_size()
    if world_size() > 1:
        dist.all_gather_object(objects, obj)
    return objects


def barrier() -> None:
    """Block until every rank has called this."""
    if world_size() > 1:
        dist.barrier()


class StopFlag:
    """Flag that any rank can set, reduced over all ranks without synchronising with a GPU."""

    def __init__(self) -> None:
        # A gloo group of its own, because NCCL cannot reduce CPU tensors.
        self._group = dist.new_group(backend="gloo") if world_size() > 1 else None
        self._flag = torch.zeros((), dtype=torch.int32)
        self._work: dist.Work | None = None

    def poll(self, local: bool) -> bool:
        """Return whether any rank had set the flag in the previous call.

        The reduction of this call runs in the background, so that no rank waits for the slowest.

        Args:
            local: flag of this rank.
        """
        if self._group is None:
            return local
        is_set = False
        if self._work is not None:
            self._work.wait()
            is_set = bool(self._flag)
        self._flag = torch.tensor(int(local), dtype=torch.int32)
        self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, self._group, async_op=True)
        return is_set


def to_local(tensor: Tensor) -> Tensor:
    """Return the local shard of a tensor, which shares its memory; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor on every rank; a plain tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_rows(like: Tensor, rows: Tensor) -> Tensor:
    """Return the values for the rows of this rank's shard.

    Args:
        like: tensor [N, ...], sharded or not.
        rows: one value per row of it [N], the same on every rank.
    """
    if not isinstance(like, DTensor):
        return rows
    # `src_data_rank=None`: every rank has all values, so nothing is sent.
    return distribute_tensor(rows, like.device_mesh, like.placements, src_data_rank=None).to_local()


def scatter_from_rank0(like: Tensor, tensor: Tensor | None) -> Tensor:
    """Distribute a tensor of rank 0 to all ranks.

    Args:
        like: tensor of this rank.
        tensor: tensor of the same shape on rank 0; ignored on the other ranks.

    Returns:
        A new tensor with the sharding, dtype and device of `like`.
    """
    full = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    if rank() == 0:
        assert tensor is not None
        full.copy_(tensor)
    if isinstance(like, DTensor):
        return distribute_tensor(full, like.device_mesh, like.placements)
    if world_size() > 1:
        dist.broadcast(full, 0)
    return full


def copy_to_host(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Copy full tensors to the host memory of rank 0; return an empty dict on the other ranks.

    A copy from a GPU goes to pinned memory, because training waits for it.

    Args:
        tensors: (name, tensor), sharded or replicated.
    """
    copies: dict[str, Tensor] = {}
    for name, tensor in tensors:
        full = full_tensor(tensor.detach())
        if rank() == 0:
            copy = torch.empty_like(full, device="cpu", pin_memory=full.is_cuda)
            copies[name] = copy.copy_(full, non_blocking=True)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return copies


def first_holders(names: Iterable[str]) -> dict[str, int]:
    """Return the first rank that holds each name, in the same order on every rank.

    Args:
        names: names that this rank holds.
    """
    holders: dict[str, int] = {}
    for holder, held in enumerate(all_gather_object(list(names))):
        for name in held:
            holders.setdefault(name, holder)
    return holders


def gather_to_rank0(tensor: Tensor | None, holder: int, like: Tensor) -> Tensor:
    """Send a tensor from the rank that holds it to rank 0.

    Args:
        tensor: the tensor, on its holder.
        holder: rank of the holder.
        like: tensor with its shape, dtype and device, on rank 0.

    Returns:
        The tensor on rank 0; on the other ranks `tensor`, or `like` without one.
    """
    local = like if tensor is None else tensor
    if holder == 0:
        return local
    if rank() == holder:
        dist.send(local.contiguous(), 0)
    elif rank() == 0:
        local = torch.empty_like(like)
        dist.recv(local, holder)
    return local
