"""The Triton kernels against the formula in float64: output and every gradient.

On a CPU Triton's interpreter runs them, on small shapes; a GPU runs the released ones as well.
"""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tokengrow.kernels import triton_rows
from tokengrow.kernels.dispatch import pattention, pattentions
from tokengrow.kernels.reference import ACTIVATIONS, pattention_naive

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    # Odds too large for float32 make a probability of 0, as they should; NumPy mentions it.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
]

GOLDEN = Path(__file__).parents[1] / "golden"
FIGURES = sorted(GOLDEN.glob("C_pattention_*.safetensors"))

# Relative to the norm of the reference: float32 sums; 8 and 11 bits in scores, weights and output.
# Or twice the error of the plain formula in this dtype on this device, where that is larger: of the
# rounding of a score, which grows with its size, softmax makes a relative error of a weight.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
ODD = [(1, 5, 3, 4), (7, 33, 19, 21), (5, 16, 24, 8), (2, 8, 129, 3)]
RELEASED = [(300, 768, 768, 768), (257, 768, 3072, 768), (129, 1536, 6144, 1536)]
RELEASED += [(65, 768, 34480, 768)]  # the longest rows of the paper: they do not fit into registers

Layer = tuple[Tensor, Tensor, float]


def random_layers(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, count: int = 1
) -> tuple[Tensor, list[Layer]]:
    """x [T, D] and (key [N, D], value [N, E], tau) of layers, exact in the dtype."""
    t, d, n, e = shape
    generator = torch.Generator().manual_seed(hash(shape) % 1000)

    def draw(rows: int, columns: int, scale: float) -> Tensor:
        drawn = torch.randn(rows, columns, generator=generator) * scale
        return drawn.to(dtype).to(device).requires_grad_()

    layers = [
        (draw(n, d, 2 * d**-0.5), draw(n, e, n**-0.5), math.sqrt(n) * (1 + 0.5 * index))
        for index in range(count)
    ]
    return draw(t, d, 1.0), layers


def learn(x: Tensor, layers: list[Layer], activation: str, kernel: str) -> list[Tensor]:
    """Outputs and the gradients of every input, for the same random gradients of the outputs."""
    inputs = [x, *(each for layer in layers for each in layer[:2])]
    outs = pattentions(x, layers, activation, kernel)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(out.shape, generator=generator).to(out) for out in outs]
    return [*outs, *torch.autograd.grad(outs, inputs, grads)]


def wide(x: Tensor, layers: list[Layer]) -> tuple[Tensor, list[Layer]]:
    """The same in float64."""

    def widened(tensor: Tensor) -> Tensor:
        return tensor.detach().double().requires_grad_()

    return widened(x), [(widened(key), widened(value), tau) for key, value, tau in layers]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Distance of each tensor to its reference, relative to the norm of that."""
    pairs = zip(found, exact, strict=True)
    return [((mine.double() - right).norm() / right.norm()).item() for mine, right in pairs]


def assert_near_float64(x: Tensor, layers: list[Layer], activation: str) -> None:
    """Output and every gradient by the kernels, against float64."""
    exact = learn(*wide(x, layers), activation, "naive")
    found = errors(learn(x, layers, activation, "triton"), exact)
    plain = errors(learn(x, layers, activation, "naive"), exact)
    for error, beside in zip(found, plain, strict=True):
        assert error <= max(TOLERANCE[x.dtype], 2 * beside)


@DTYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", ODD, ids=str)
def test_output_and_every_gradient_on_odd_shapes(
    shape: tuple[int, int, int, int], activation: str, dtype: torch.dtype, device: str
) -> None:
    assert_near_float64(*random_layers(shape, dtype, device), activation)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@DTYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", RELEASED, ids=str)
def test_output_and_every_gradient_on_released_shapes(
    shape: tuple[int, int, int, int],
    activation: str,
    dtype: torch.dtype,
    device: str,
) -> None:
    assert_near_float64(*random_layers(shape, dtype, device), activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_parameter_token(activation: str, device: str) -> None:
    # The only score, 3, has norm 3: weight gelu(1), 1 or softmax(3) = 1, whatever the score is, so
    # that nothing reaches x and the key.
    x, key, value = (torch.full((1, 1), number, device=device) for number in (3.0, 1.0, 1.0))
    leaves = [x.requires_grad_(), key.requires_grad_(), value.requires_grad_()]
    out = pattention(*leaves, activation, 1.0, "triton")
    out.backward()
    wanted = {"l2_norm_gelu": 0.8413447, "gelu_l2_norm": 1.0, "softmax": 1.0}[activation]
    assert out.item() == pytest.approx(wanted, rel=1e-6)
    assert [leaf.grad.item() for leaf in leaves] == pytest.approx([0, 0, wanted], abs=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("file", FIGURES, ids=lambda file: file.stem)
def test_the_published_figures(file: Path, activation: str, device: str) -> None:
    figures = load_file(file, device=device)
    x, key, value = (figures[name].requires_grad_() for name in ("x", "key", "value"))
    out = pattention(x, key, value, activation, len(key) ** 0.5, "triton")
    (out * figures["R"]).sum().backward()
    found = {"out": out, "grad_x": x.grad, "grad_key": key.grad, "grad_value": value.grad}
    for name, tensor in found.items():
        reference = figures[f"{activation}.f32.{name}"]
        bound = 5e-6 * max(1.0, reference.abs().max().item())
        assert (tensor - reference).abs().max().item() <= bound, name


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(5, 16, 24, 8), (3, 8, 40, 8)], ids=str)
def test_layers_that_go_together_are_those_that_go_alone(
    shape: tuple[int, int, int, int], activation: str, device: str
) -> None:
    x, layers = random_layers(shape, torch.float32, device, count=3)
    assert_near_float64(x, layers, activation)


def test_layers_of_different_sizes_go_one_by_one(device: str) -> None:
    x, (first,) = random_layers((5, 16, 24, 8), torch.float32, device)
    _, (second,) = random_layers((5, 16, 7, 8), torch.float32, device)
    assert_near_float64(x, [first, second], "l2_norm_gelu")


@DTYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rows_that_do_not_fit_into_registers_are_read_in_pieces(
    activation: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_rows, "LONGEST", 16)
    monkeypatch.setattr(triton_rows, "PIECE", 16)
    assert_near_float64(*random_layers((5, 16, 53, 8), dtype, device), activation)


@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm"])
def test_a_zero_row_gives_zeros_and_passes_zeros_on(activation: str, device: str) -> None:
    x, layers = random_layers((3, 4, 5, 6), torch.float32, device)
    with torch.no_grad():
        x[1] = 0.0
    out, x_grad, *_ = learn(x, layers, activation, "triton")
    assert not out[1].any() and not x_grad[1].any()
    assert out[[0, 2]].all() and x_grad[[0, 2]].any(1).all()


@pytest.mark.parametrize("size", [1e-25, 1e-3, 1e4, 1e18, 1e30])
def test_no_square_of_a_score_overflows_or_vanishes(size: float, device: str) -> None:
    # The weights do not depend on the size of the scores, and 1e30 squared is not a float32.
    scores = torch.tensor([[[3.0, 4.0, 0.0]]], device=device) * size
    weights, _ = triton_rows.rows_forward(scores, "l2_norm_gelu", [5.0])
    # Below the smallest norm a row counts as zero: see kernels/README.md.
    wanted = [0.0] * 3 if size < 1e-12 else [2.9959503, 3.9998733, 0.0]
    assert weights.flatten().tolist() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_softmax_of_huge_scores(dtype: torch.dtype, device: str) -> None:
    scores = torch.tensor([[[3e4, 3e4, -3e4, 0.0]]], device=device).to(dtype)
    weights, _ = triton_rows.rows_forward(scores, "softmax", [2.0])
    assert weights.flatten().tolist() == [2.0, 2.0, 0.0, 0.0]  # tau² / 2 each


def test_no_tokens_are_none(device: str) -> None:
    x, layers = random_layers((3, 4, 5, 6), torch.float32, device)
    key, value, tau = layers[0]
    out = pattention(x[:0], key, value, "l2_norm_gelu", tau, "triton")
    out.sum().backward()
    assert out.shape == (0, 6) and not key.grad.any() and not value.grad.any()


def test_the_normal_distribution_of_half_precision_is_as_exact_as_the_kernel_says() -> None:
    # gelu(u) = u Phi(u), for which the kernel has a polynomial in u² in place of erf.
    u = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    y = u * u
    p0, p1, p2, p3 = (getattr(triton_rows, f"P{i}").value for i in range(4))
    found = 1 / (1 + torch.exp2(-u * (((y * p3 + p2) * y + p1) * y + p0)))
    exact = torch.special.ndtr(u)
    assert (u * (found - exact)).abs().max() < 7.5e-5
    near = u > -6
    assert (found[near] / exact[near] - 1).abs().max() < 6e-3


def test_the_result_does_not_depend_on_what_else_is_computed(device: str) -> None:
    x, layers = random_layers((7, 33, 19, 21), torch.bfloat16, device)
    once, again = (learn(x, layers, "l2_norm_gelu", "triton") for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(once, again, strict=True))


def test_the_naive_formula_of_huge_scores_is_what_it_was() -> None:
    # In float32 the naive formula gives up where squares overflow; the kernels do not.
    x, key, value = torch.full((1, 1), 1e30), torch.ones(2, 1), torch.ones(2, 1)
    assert pattention_naive(x, key, value, "l2_norm_gelu", 1.0).item() == 0.0
