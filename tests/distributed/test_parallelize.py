"""Blocks compiled in place: the same function under the same names, one code for all layers."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from tokengrow.distributed.parallelize import compile_blocks, is_compiled
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import TokenFormer


@pytest.fixture
def model(tiny_model: Callable[..., ModelConfig]) -> Iterator[TokenFormer]:
    model = TokenFormer(tiny_model(layers=3, init="published"))
    model.init_weights(torch.Generator().manual_seed(0))
    counters.clear()
    yield model
    torch.compiler.reset()


@pytest.mark.parametrize("kernel", ["naive", "compiled", "triton"])
def test_loss_and_gradients_stay(model: TokenFormer, kernel: str) -> None:
    if kernel == "triton" and torch.cuda.is_available():
        pytest.skip("on a GPU: test_gpu.py")
    model.set_kernel(kernel)
    ids = torch.randint(512, (2, 33), generator=torch.Generator().manual_seed(1))

    def learn() -> list[torch.Tensor]:
        loss = model(ids[:, :-1], targets=ids[:, 1:])
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    wanted, names = learn(), list(model.state_dict())
    compile_blocks(model.blocks)
    assert all(is_compiled(block) for block in model.blocks)
    for found, reference in zip(learn(), wanted, strict=True):
        torch.testing.assert_close(found, reference, rtol=2e-5, atol=2e-6)
    assert list(model.state_dict()) == names


def test_layers_share_one_code(model: TokenFormer) -> None:
    compile_blocks(model.blocks)
    model(torch.zeros(1, 8, dtype=torch.int64))
    assert counters["stats"]["unique_graphs"] == 1


def test_a_model_that_is_not_compiled_says_so(model: TokenFormer) -> None:
    assert not is_compiled(model.blocks[0])
