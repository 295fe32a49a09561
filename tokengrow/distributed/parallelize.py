"""What is done to a model and its optimizer for the devices that it trains on.

The order is: activation checkpointing, torch.compile, sharding. Blocks are changed in place, so
that names in the state dict stay.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

CHECKPOINTING = ("none", "selective", "block")

PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "tokengrow::pattention",
)
"""What selective checkpointing keeps: the operators in which nearly all of the FLOPs are."""


def checkpoint_blocks(
    blocks: Iterable[nn.Module],
    what: str,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Has the backward pass compute anew what the forward pass then need not keep.

    Args:
        blocks: of one model, not compiled yet.
        what: none; block: all but a block's input; selective: all but what `PRODUCTS` give.
        around: the context in which the model calls its blocks, which the backward pass has left.
    """
    if what == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if what == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    for block in blocks:
        block.forward = _checkpointed(block.forward, around, options)


def _checkpointed(
    forward: Callable[..., Tensor],
    around: Callable[[], AbstractContextManager[None]],
    options: dict[str, Any],
) -> Callable[..., Tensor]:
    def compute(*inputs: Any) -> Tensor:
        with around():
            return forward(*inputs)

    # A function of ours: torch.compile passes by what begins in torch itself.
    def run(*inputs: Any) -> Tensor:
        return checkpoint(compute, *inputs, **options)

    return run


def _keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Whether selective checkpointing keeps what an operator gives."""
    keep = operator.name().partition(".")[0] in PRODUCTS
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compiles each block in place, each as one whole graph; equal blocks share their code.

    Block by block, so that the time it takes does not depend on the number of layers. Shapes are
    fixed: a batch of another size is compiled anew.

    Args:
        blocks: of one model. What was compiled for another one before is dropped: a grown model is
            a new size, and a process keeps few sizes of a function.
    """
    torch.compiler.reset()
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False)


def is_compiled(block: nn.Module) -> bool:
    """Whether a block was compiled in place."""
    return block._compiled_call_impl is not None


def shard(module: Any, mesh: DeviceMesh, narrow: bool) -> Any:
    """Leaves each device its part of every parameter (FSDP2): rows, shared out evenly.

    Args:
        module: a LightningModule with the model in `model`, its layers in `model.blocks`.
        mesh: of Fabric.
        narrow: send the weights of the blocks around in bfloat16, in which autocast multiplies
            them; gradients are summed in float32. What is outside of the blocks stays float32, as
            the residual stream does.
    """
    devices = mesh["data_parallel"]
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if narrow:
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    for block in module.model.blocks:
        fully_shard(block, mesh=devices, mp_policy=policy)
    fully_shard(module.model, mesh=devices, mp_policy=MixedPrecisionPolicy())
    # Built without memory; Fabric would fill it with values, which are not wanted either.
    return module.to_empty(device=mesh.device_type)


def share_optimizer(optimizer: torch.optim.Optimizer) -> Any:
    """The optimizer with its state shared out over the ranks (ZeRO stage 1).

    Args:
        optimizer: new, an AdamW over all parameters.

    Returns:
        A ZeroRedundancyOptimizer, whose `optim` is of the same kind, over this rank's parameters.
    """
    # Its import warns of what torch itself has deprecated.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    groups = [dict(group) for group in optimizer.param_groups]
    settings = dict(optimizer.defaults)
    settings.pop("decoupled_weight_decay")  # which AdamW gives to Adam, of which it is one
    return ZeroRedundancyOptimizer(groups, type(optimizer), **settings)


def own_part(optimizer: Any) -> Any:
    """The optimizer over this rank's parameters: itself, unless its state is shared out."""
    return getattr(optimizer, "optim", optimizer)
