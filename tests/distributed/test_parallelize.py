"""Blocks compiled and recomputed in place: the same function under the same names."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from tokengrow.distributed.parallelize import checkpoint_blocks, compile_blocks, is_compiled
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import TokenFormer, fastest_attention


@pytest.fixture
def model(tiny_model: Callable[..., ModelConfig]) -> Iterator[TokenFormer]:
    model = TokenFormer(tiny_model(layers=3, init="published"))
    model.init_weights(torch.Generator().manual_seed(0))
    counters.clear()
    yield model
    torch.compiler.reset()


@pytest.mark.parametrize("kernel", ["reference", "compiled", "triton"])
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


class Operators(TorchDispatchMode):
    """Counts the operators that run while the block does."""

    def __init__(self) -> None:
        super().__init__()
        self.times: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.times[func.name().removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def operators(model: TokenFormer) -> Counter[str]:
    """What a forward and a backward pass run."""
    ids = torch.randint(512, (2, 33), generator=torch.Generator().manual_seed(1))
    with Operators() as counted:
        model(ids[:, :-1], targets=ids[:, 1:]).backward()
    return counted.times


@pytest.mark.parametrize(
    ("what", "products", "attention"), [("none", 0, 0), ("selective", 0, 0), ("block", 27, 3)]
)
def test_the_backward_pass_computes_anew_what_it_is_told(
    model: TokenFormer, what: str, products: int, attention: int
) -> None:
    model.set_kernel("reference")
    before = operators(model)
    checkpoint_blocks(model.blocks, what)
    after = operators(model)
    assert (
        after["mm"] - before["mm"] == products
    )  # of ten in a block all but the last, which nothing needs
    flash = "_scaled_dot_product_flash_attention_for_cpu"
    assert after[flash] - before[flash] == attention
    assert after["gelu"] == (before["gelu"] if what == "none" else 2 * before["gelu"])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("what", ["selective", "block"])
def test_loss_and_gradients_stay_when_they_are_computed_anew(
    model: TokenFormer, what: str, compiled: bool
) -> None:
    ids = torch.randint(512, (2, 33), generator=torch.Generator().manual_seed(1))

    def learn() -> list[torch.Tensor]:
        loss = model(ids[:, :-1], targets=ids[:, 1:])
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    model.set_kernel("reference")
    wanted, names = learn(), list(model.state_dict())
    checkpoint_blocks(model.blocks, what, fastest_attention)
    if compiled:
        for block in model.blocks:  # the graph alone: code for it is made elsewhere in this file
            block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    for found, reference in zip(learn(), wanted, strict=True):
        torch.testing.assert_close(found, reference, rtol=2e-5, atol=2e-6)
    assert list(model.state_dict()) == names
    assert counters["stats"]["unique_graphs"] == compiled


def test_recomputed_blocks_run_in_the_context_in_which_they_ran(model: TokenFormer) -> None:
    entered: list[str] = []

    @contextmanager
    def around() -> Iterator[None]:
        entered.append("in")
        yield

    model.set_kernel("reference")
    checkpoint_blocks(model.blocks, "block", around)
    operators(model)
    assert len(entered) == 2 * len(model.blocks), "forward, and again behind it"
