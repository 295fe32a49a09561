"""Tests of the cross-entropy of a linear head: loss and gradients, compared with PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokengrow.kernels import loss as head
from tokengrow.kernels import triton_loss
from tokengrow.kernels.loss import linear_cross_entropy

ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def random_head(m: int, d: int, v: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden [M, D], weight [V, D] and targets [M]."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(m, d, generator=generator), torch.randn(v, d, generator=generator)
    targets = torch.randint(v, (m,), generator=generator).to(device)
    return hidden.to(device).requires_grad_(), weight.to(device).requires_grad_(), targets


@pytest.mark.parametrize("block", [16, 64], ids=lambda block: f"block_{block}")
def test_gradient_overwrites_rows_of_logits(
    block: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_loss, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(5, 50, generator=generator) * 9).to(device).requires_grad_()
    targets = torch.tensor([0, 49, 15, 16, 33], device=device)
    expected = F.cross_entropy(logits, targets, reduction="none")
    expected.sum().backward()
    actual, losses = logits.detach().clone(), torch.full((5,), torch.nan, device=device)
    triton_loss.cross_entropy_rows(actual, targets, losses, needs_grad=False)
    assert torch.equal(actual, logits.detach()), "without a gradient the logits are unchanged"
    triton_loss.cross_entropy_rows(actual, targets, losses, needs_grad=True)
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(actual, logits.grad, atol=1e-7, rtol=1e-5)


def test_large_logits_do_not_overflow(device: str) -> None:
    logits = torch.tensor([[1e4, 1e4, -1e4]], device=device)
    losses = torch.empty(1, device=device)
    triton_loss.cross_entropy_rows(
        logits, torch.tensor([1], device=device), losses, needs_grad=True
    )
    assert losses.item() == pytest.approx(0.6931472)  # ln 2: two equally likely tokens
    assert logits.tolist() == [[pytest.approx(0.5), pytest.approx(-0.5), 0.0]]


def test_loss_is_the_mean_negative_log_probability() -> None:
    # V = 2. Logits (0, ln 3) give probabilities 1/4 and 3/4; logits (0, 0) give halves.
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])
    loss = linear_cross_entropy(logits, torch.eye(2), torch.tensor([0, 1]))
    assert loss.item() == pytest.approx((math.log(4) + math.log(2)) / 2)


def test_bfloat16_logits_give_a_float32_loss() -> None:
    logits = torch.randn(16, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    loss = linear_cross_entropy(logits, torch.eye(50).bfloat16(), torch.arange(16))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, F.cross_entropy(logits.float(), torch.arange(16)))


def test_float64_logits_give_a_float64_loss() -> None:
    zeros = torch.zeros(1, 4, dtype=torch.float64)
    loss = linear_cross_entropy(zeros, torch.eye(4, dtype=torch.float64), torch.tensor([2]))
    assert loss.item() == math.log(4)


def test_cpu_loss_equals_plain_cross_entropy() -> None:
    hidden, weight, targets = random_head(6, 8, 11, "cpu")
    expected = F.cross_entropy(hidden @ weight.T, targets)
    assert torch.equal(linear_cross_entropy(hidden, weight, targets), expected)


def test_chunks_respect_the_limit_and_cover_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head, "MAX_LOGITS", 40)
    chunks = head._chunks(positions=10, vocabulary=11)
    assert [len(range(10)[chunk]) * 11 <= 40 for chunk in chunks] == [True] * len(chunks)
    assert [i for chunk in chunks for i in range(10)[chunk]] == list(range(10))


@pytest.mark.parametrize("max_logits", [2**30, 40], ids=["one_chunk", "chunks"])
def test_fused_loss_has_the_gradients_of_the_plain_one(
    max_logits: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "MAX_LOGITS", max_logits)
    hidden, weight, targets = random_head(6, 8, 11, device)
    expected = F.cross_entropy(hidden @ weight.T, targets)
    actual_loss = head._FusedLoss.apply(hidden, weight, targets, True)
    torch.testing.assert_close(actual_loss, expected)
    # A third is the share of one of three micro-batches, and not a power of two.
    grads = torch.autograd.grad(actual_loss / 3, (hidden, weight))
    torch.testing.assert_close(grads, torch.autograd.grad(expected / 3, (hidden, weight)))


def test_scale_of_the_loss_is_not_rounded_to_bfloat16(device: str) -> None:
    hidden, weight, targets = random_head(6, 8, 11, device)
    narrow = hidden.detach().bfloat16().requires_grad_()
    (full,) = torch.autograd.grad(head._FusedLoss.apply(narrow, weight, targets, True), narrow)
    loss = head._FusedLoss.apply(narrow, weight, targets, True)
    (third,) = torch.autograd.grad(loss / 3, narrow)
    # Each entry is rounded once more, up or down. With 1 / 3 in bfloat16, all would gain 0.2 %.
    assert (3 * third.double().norm() / full.double().norm()).item() == pytest.approx(1, abs=1e-3)


class TestOnAGpu:
    pytestmark = ON_GPU

    @pytest.mark.parametrize("max_logits", [2**30, 3000], ids=["one_chunk", "chunks"])
    def test_loss_and_gradients(self, max_logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(head, "MAX_LOGITS", max_logits)
        hidden, weight, targets = random_head(100, 64, 999, "cuda")
        actual_loss = linear_cross_entropy(hidden, weight, targets)
        expected = F.cross_entropy((hidden.double() @ weight.double().T), targets)
        assert actual_loss.item() == pytest.approx(expected.item(), rel=1e-6)
        grads = torch.autograd.grad(actual_loss * 3, (hidden, weight))
        for grad, reference in zip(
            grads, torch.autograd.grad(expected * 3, (hidden, weight)), strict=True
        ):
            assert (grad - reference).norm() <= 2e-6 * reference.norm()

    @pytest.mark.parametrize("max_logits", [2**30, 50_000], ids=["one_chunk", "chunks"])
    def test_autocast_keeps_a_float32_weight_gradient(
        self, max_logits: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(head, "MAX_LOGITS", max_logits)
        hidden, weight, targets = random_head(300, 64, 999, "cuda")
        with torch.autocast("cuda", torch.bfloat16):
            actual_loss = linear_cross_entropy(hidden, weight, targets)
        expected = F.cross_entropy(hidden @ weight.T, targets)
        assert actual_loss.dtype == torch.float32
        assert actual_loss.item() == pytest.approx(expected.item(), rel=2e-3)
        grads = torch.autograd.grad(actual_loss, (hidden, weight))
        for grad, reference in zip(
            grads, torch.autograd.grad(expected, (hidden, weight)), strict=True
        ):
            assert grad.dtype == torch.float32
            assert (grad - reference).norm() <= 2e-2 * reference.norm()

    def test_no_gradients_are_computed_without_grad_mode(self) -> None:
        hidden, weight, targets = random_head(100, 64, 999, "cuda")
        expected = linear_cross_entropy(hidden, weight, targets)
        with torch.no_grad():
            actual_loss = linear_cross_entropy(hidden, weight, targets)
        assert torch.equal(actual_loss, expected.detach()) and not actual_loss.requires_grad

    def test_logits_are_not_stored_in_float32(self) -> None:
        m, v = 4096, 50304
        hidden, weight, targets = random_head(m, 64, v, "cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            linear_cross_entropy(hidden, weight, targets).backward()
        assert torch.cuda.max_memory_allocated() - before < 2.4 * m * v
