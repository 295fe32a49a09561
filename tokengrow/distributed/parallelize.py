"""What is done to a model between the CPU and Fabric: so far torch.compile, block by block."""

from collections.abc import Iterable

import torch
from torch import nn


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compiles each block in place, each as one whole graph; equal blocks share their code.

    In place, so that names in the state dict stay; block by block, so that the time it takes does
    not depend on the number of layers. Shapes are fixed: a batch of another size is compiled anew.

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
