"""Process of a data-parallel test: gradients of a model with Triton kernels, averaged.

    torchrun --nproc-per-node 2 parallel_worker.py ddp|fsdp2

Exits with an error unless the gradients equal those of one process with both halves of the batch.
"""

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tokengrow.model.config import ModelConfig, ParameterTokens
from tokengrow.model.tokenformer import TokenFormer

CONFIG = ModelConfig(
    vocab_size=64,
    context_length=8,
    layers=2,
    width=16,
    heads=2,
    tokens=ParameterTokens(query=12, key=12, value=12, output=10, ffn=24),
)


def build_model() -> TokenFormer:
    model = TokenFormer(CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        # Balanced initialisation sets these values to 0, which stops all gradients before them.
        for block in model.blocks:
            block.ffn.value_param_tokens.fill_(0.1)
            block.attention.output.value_param_tokens.fill_(0.1)
    model.set_kernel("triton")
    return model


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model(ids[:, :-1], targets=ids[:, 1:]).backward()
    by_name = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        by_name[name.removeprefix("module.")] = (
            grad.full_tensor() if isinstance(grad, DTensor) else grad
        )
    return by_name


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    ids = torch.randint(64, (4, 9), generator=torch.Generator().manual_seed(1))
    expected = gradients(build_model(), ids)
    model: nn.Module = build_model()
    if sys.argv[1] == "ddp":
        model = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    actual = gradients(model, ids[2 * rank : 2 * rank + 2])
    assert set(actual) == set(expected)
    for name, grad in actual.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-7, msg=name)
    # A reducer that outlives its process group can wait for a thread that waits for the GIL.
    del model
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
