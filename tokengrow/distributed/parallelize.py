"""Preparation of a model and its optimizer for the devices that it trains on.

The order is activation checkpointing, torch.compile, sharding. Blocks are changed in place, so that
names in the state dict stay the same.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

if TYPE_CHECKING:
    from torch.distributed.optim import ZeroRedundancyOptimizer

CheckpointingMode = Literal["none", "selective", "block"]
"""Activations that the backward pass recomputes: none, all but matrix products, or all."""

SAVED_OPERATORS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "tokengrow::pattention",
)
"""Operators whose outputs selective checkpointing saves; they do nearly all of the FLOPs."""


def apply_activation_checkpointing(
    blocks: Iterable[nn.Module],
    mode: CheckpointingMode,
    context: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Recompute activations of each block in the backward pass instead of saving them.

    Args:
        blocks: blocks of a model, not compiled yet.
        mode: none; block: only the input of a block is saved; selective: the outputs of
            `SAVED_OPERATORS` are saved too.
        context: context in which the model calls its blocks; recomputation enters it again.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _selective_policy)
    for block in blocks:
        block.forward = _checkpointed_forward(block.forward, context, options)


def _checkpointed_forward(
    forward: Callable[..., Tensor],
    context: Callable[[], AbstractContextManager[None]],
    options: dict[str, Any],
) -> Callable[..., Tensor]:
    def compute(*inputs: Any) -> Tensor:
        with context():
            return forward(*inputs)

    # A function of this module, because torch.compile skips a frame that belongs to torch.
    def run(*inputs: Any) -> Tensor:
        return cast(Tensor, checkpoint(compute, *inputs, **options))

    return run


def _selective_policy(
    context: Any, operator: torch._ops.OpOverload, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    """Save the outputs of `SAVED_OPERATORS`, recompute all others."""
    if operator.name().partition(".")[0] in SAVED_OPERATORS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compile each block in place as one full graph; equal blocks share their code.

    Compile time does not depend on the number of layers. Shapes are static: a batch of another
    size is compiled again.

    Code of previous models is dropped. A grown model has new sizes, and torch limits the number of
    recompilations of a function in a process.

    Args:
        blocks: blocks of a model.
    """
    torch.compiler.reset()
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False)


def apply_fsdp(module: Any, mesh: DeviceMesh, bf16_params: bool) -> Any:
    """Shard every parameter by rows over the devices (FSDP2).

    Args:
        module: LightningModule with the model in `model` and its layers in `model.blocks`.
        mesh: device mesh of Fabric.
        bf16_params: whether the parameters of blocks are gathered in bfloat16, the dtype in which
            autocast multiplies them. Gradients are reduced in float32. Parameters outside the
            blocks stay in float32, like the residual stream.

    Returns:
        The module, with uninitialised parameters on the device.
    """
    devices = mesh["data_parallel"]
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if bf16_params:
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    for block in module.model.blocks:
        fully_shard(block, mesh=devices, mp_policy=policy)
    fully_shard(module.model, mesh=devices, mp_policy=MixedPrecisionPolicy())
    # The parameters are on the meta device. Fabric would initialise them, which is wasted time.
    return module.to_empty(device=mesh.device_type)


def shard_optimizer(optimizer: torch.optim.Optimizer) -> "ZeroRedundancyOptimizer":
    """Shard the optimizer state over the ranks (ZeRO stage 1).

    Args:
        optimizer: new AdamW over all parameters.

    Returns:
        A ZeroRedundancyOptimizer. Its `optim` has the class of `optimizer`, and holds the
        parameters of this rank.
    """
    # Imported here because the import warns about deprecated parts of torch itself.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    groups = [dict(group) for group in optimizer.param_groups]
    settings = dict(optimizer.defaults)
    settings.pop("decoupled_weight_decay")  # an argument of Adam, which AdamW sets itself
    return ZeroRedundancyOptimizer(groups, type(optimizer), **settings)


def local_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer of this rank's parameters: `optimizer` itself, unless it is sharded."""
    return getattr(optimizer, "optim", optimizer)
