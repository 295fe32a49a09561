"""What tests of kernels share: where they run, and memory in which nothing is zero by chance."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def device() -> str:
    """The GPU if there is one, else the CPU with Triton's interpreter."""
    return DEVICE


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """Products of float32 numbers are not rounded to TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN: what a kernel does not write is seen."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*arguments: Any, **options: Any) -> Tensor:
            tensor = make(*arguments, **options)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return made

    monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    yield
