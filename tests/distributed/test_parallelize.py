"""Blocks compiled and checkpointed in place: same function, same names in the state dict."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from tokengrow.compat import is_compiled
from tokengrow.distributed.parallelize import (
    CheckpointingMode,
    apply_activation_checkpointing,
    compile_blocks,
)
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import TokenFormer, fastest_attention


@pytest.fixture
def model(tiny_model: Callable[..., ModelConfig]) -> Iterator[TokenFormer]:
    model = TokenFormer(tiny_model(layers=3, init="published"))
    model.init_weights(torch.Generator().manual_seed(0))
    counters.clear()
    yield model
    torch.compiler.reset()


def loss_and_gradients(model: TokenFormer) -> list[Tensor]:
    """Return the loss of a fixed batch, and the gradients of all parameters."""
    ids = torch.randint(512, (2, 33), generator=torch.Generator().manual_seed(1))
    loss = model(ids[:, :-1], targets=ids[:, 1:])
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("kernel", ["reference", "compiled", "triton"])
def test_compiling_keeps_loss_and_gradients(model: TokenFormer, kernel: str) -> None:
    if kernel == "triton" and torch.cuda.is_available():
        pytest.skip("on a GPU: test_gpu.py")
    model.set_kernel(kernel)
    expected, names = loss_and_gradients(model), list(model.state_dict())
    compile_blocks(model.blocks)
    assert all(is_compiled(block) for block in model.blocks)
    for actual, reference in zip(loss_and_gradients(model), expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=2e-5, atol=2e-6)
    assert list(model.state_dict()) == names


def test_equal_blocks_share_one_graph(model: TokenFormer) -> None:
    compile_blocks(model.blocks)
    model(torch.zeros(1, 8, dtype=torch.int64))
    assert counters["stats"]["unique_graphs"] == 1


def test_is_compiled_is_false_for_a_new_model(model: TokenFormer) -> None:
    assert not is_compiled(model.blocks[0])


class OperatorCounter(TorchDispatchMode):
    """Context that counts the operators that run in it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name().removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def count_operators(model: TokenFormer) -> Counter[str]:
    """Count the operators of a forward and a backward pass."""
    ids = torch.randint(512, (2, 33), generator=torch.Generator().manual_seed(1))
    with OperatorCounter() as counter:
        model(ids[:, :-1], targets=ids[:, 1:]).backward()
    return counter.counts


@pytest.mark.parametrize(
    ("mode", "products", "attention"), [("none", 0, 0), ("selective", 0, 0), ("block", 27, 3)]
)
def test_mode_sets_which_operators_are_recomputed(
    model: TokenFormer, mode: CheckpointingMode, products: int, attention: int
) -> None:
    model.set_kernel("reference")
    before = count_operators(model)
    apply_activation_checkpointing(model.blocks, mode)
    after = count_operators(model)
    # Of the ten products of a block all but the last, whose output the backward pass does not need.
    assert after["mm"] - before["mm"] == products
    flash = "_scaled_dot_product_flash_attention_for_cpu"
    assert after[flash] - before[flash] == attention
    assert after["gelu"] == (before["gelu"] if mode == "none" else 2 * before["gelu"])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("mode", ["selective", "block"])
def test_recomputation_keeps_loss_and_gradients(
    model: TokenFormer, mode: CheckpointingMode, compiled: bool
) -> None:
    model.set_kernel("reference")
    expected, names = loss_and_gradients(model), list(model.state_dict())
    apply_activation_checkpointing(model.blocks, mode, fastest_attention)
    if compiled:
        for block in model.blocks:  # only the graph: other tests here generate its code
            block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    for actual, reference in zip(loss_and_gradients(model), expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=2e-5, atol=2e-6)
    assert list(model.state_dict()) == names
    assert counters["stats"]["unique_graphs"] == compiled


def test_recomputation_enters_the_context_again(model: TokenFormer) -> None:
    entered: list[str] = []

    @contextmanager
    def context() -> Iterator[None]:
        entered.append("in")
        yield

    model.set_kernel("reference")
    apply_activation_checkpointing(model.blocks, "block", context)
    count_operators(model)
    assert len(entered) == 2 * len(model.blocks), "forward, and again in the backward pass"
