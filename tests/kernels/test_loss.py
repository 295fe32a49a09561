"""The cross-entropy of a linear head: against PyTorch's, loss and gradients."""

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
    """hidden [M, D], weight [V, D], targets [M]."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(m, d, generator=generator), torch.randn(v, d, generator=generator)
    targets = torch.randint(v, (m,), generator=generator).to(device)
    return hidden.to(device).requires_grad_(), weight.to(device).requires_grad_(), targets


@pytest.mark.parametrize("block", [16, 64], ids=lambda block: f"block_{block}")
def test_rows_of_logits_become_their_gradient(
    block: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_loss, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(5, 50, generator=generator) * 9).to(device).requires_grad_()
    targets = torch.tensor([0, 49, 15, 16, 33], device=device)
    wanted = F.cross_entropy(logits, targets, reduction="none")
    wanted.sum().backward()
    mine, losses = logits.detach().clone(), torch.full((5,), torch.nan, device=device)
    triton_loss.cross_entropy_rows(mine, targets, losses, learn=False)
    assert torch.equal(mine, logits.detach()), "the logits stay"
    triton_loss.cross_entropy_rows(mine, targets, losses, learn=True)
    torch.testing.assert_close(losses, wanted.detach())
    torch.testing.assert_close(mine, logits.grad, atol=1e-7, rtol=1e-5)


def test_logits_of_which_none_is_small_do_not_overflow(device: str) -> None:
    logits = torch.tensor([[1e4, 1e4, -1e4]], device=device)
    losses = torch.empty(1, device=device)
    triton_loss.cross_entropy_rows(logits, torch.tensor([1], device=device), losses, learn=True)
    assert losses.item() == pytest.approx(0.6931472)  # one of two equally likely
    assert logits.tolist() == [[pytest.approx(0.5), pytest.approx(-0.5), 0.0]]


def test_it_is_the_mean_negative_log_probability_of_the_targets() -> None:
    # V = 2. Logits (0, ln 3) give probabilities 1/4 and 3/4; logits (0, 0) give halves.
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])
    loss = linear_cross_entropy(logits, torch.eye(2), torch.tensor([0, 1]))
    assert loss.item() == pytest.approx((math.log(4) + math.log(2)) / 2)


def test_of_bfloat16_logits_it_is_taken_in_float32() -> None:
    logits = torch.randn(16, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    loss = linear_cross_entropy(logits, torch.eye(50).bfloat16(), torch.arange(16))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, F.cross_entropy(logits.float(), torch.arange(16)))


def test_of_float64_logits_it_stays_float64() -> None:
    zeros = torch.zeros(1, 4, dtype=torch.float64)
    loss = linear_cross_entropy(zeros, torch.eye(4, dtype=torch.float64), torch.tensor([2]))
    assert loss.item() == math.log(4)


def test_on_a_cpu_it_is_the_plain_cross_entropy() -> None:
    hidden, weight, targets = random_head(6, 8, 11, "cpu")
    wanted = F.cross_entropy(hidden @ weight.T, targets)
    assert torch.equal(linear_cross_entropy(hidden, weight, targets), wanted)


def test_pieces_hold_no_more_logits_than_they_may_and_cover_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head, "MAX_LOGITS", 40)
    pieces = head._pieces(positions=10, vocabulary=11)
    assert [len(range(10)[piece]) * 11 <= 40 for piece in pieces] == [True] * len(pieces)
    assert [i for piece in pieces for i in range(10)[piece]] == list(range(10))


@pytest.mark.parametrize("most", [2**30, 40], ids=["whole", "pieces"])
def test_the_fused_loss_has_the_gradients_of_the_plain_one(
    most: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "MAX_LOGITS", most)
    hidden, weight, targets = random_head(6, 8, 11, device)
    wanted = F.cross_entropy(hidden @ weight.T, targets)
    found = head._FusedLoss.apply(hidden, weight, targets, True)
    torch.testing.assert_close(found, wanted)
    # A third, as of one micro-batch of three: no power of two.
    mine = torch.autograd.grad(found / 3, (hidden, weight))
    torch.testing.assert_close(mine, torch.autograd.grad(wanted / 3, (hidden, weight)))


def test_a_share_of_the_loss_is_not_rounded_before_it_reaches_the_body(device: str) -> None:
    hidden, weight, targets = random_head(6, 8, 11, device)
    narrow = hidden.detach().bfloat16().requires_grad_()
    (whole,) = torch.autograd.grad(head._FusedLoss.apply(narrow, weight, targets, True), narrow)
    loss = head._FusedLoss.apply(narrow, weight, targets, True)
    (third,) = torch.autograd.grad(loss / 3, narrow)
    # Each entry is rounded once more, to either side; 1 / 3 in bfloat16 would add 0.2 % to all.
    assert (3 * third.double().norm() / whole.double().norm()).item() == pytest.approx(1, abs=1e-3)


class TestOnAGpu:
    pytestmark = ON_GPU

    @pytest.mark.parametrize("most", [2**30, 3000], ids=["whole", "pieces"])
    def test_loss_and_gradients(self, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(head, "MAX_LOGITS", most)
        hidden, weight, targets = random_head(100, 64, 999, "cuda")
        found = linear_cross_entropy(hidden, weight, targets)
        wanted = F.cross_entropy((hidden.double() @ weight.double().T), targets)
        assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
        mine = torch.autograd.grad(found * 3, (hidden, weight))
        for grad, reference in zip(
            mine, torch.autograd.grad(wanted * 3, (hidden, weight)), strict=True
        ):
            assert (grad - reference).norm() <= 2e-6 * reference.norm()

    @pytest.mark.parametrize("most", [2**30, 50_000], ids=["whole", "pieces"])
    def test_autocast_leaves_the_gradient_of_the_weight_wide(
        self, most: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(head, "MAX_LOGITS", most)
        hidden, weight, targets = random_head(300, 64, 999, "cuda")
        with torch.autocast("cuda", torch.bfloat16):
            found = linear_cross_entropy(hidden, weight, targets)
        wanted = F.cross_entropy(hidden @ weight.T, targets)
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(wanted.item(), rel=2e-3)
        mine = torch.autograd.grad(found, (hidden, weight))
        for grad, reference in zip(
            mine, torch.autograd.grad(wanted, (hidden, weight)), strict=True
        ):
            assert grad.dtype == torch.float32
            assert (grad - reference).norm() <= 2e-2 * reference.norm()

    def test_without_gradients_none_are_computed(self) -> None:
        hidden, weight, targets = random_head(100, 64, 999, "cuda")
        wanted = linear_cross_entropy(hidden, weight, targets)
        with torch.no_grad():
            found = linear_cross_entropy(hidden, weight, targets)
        assert torch.equal(found, wanted.detach()) and not found.requires_grad

    def test_no_logits_are_held_in_float32(self) -> None:
        m, v = 4096, 50304
        hidden, weight, targets = random_head(m, 64, v, "cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            linear_cross_entropy(hidden, weight, targets).backward()
        assert torch.cuda.max_memory_allocated() - before < 2.4 * m * v
