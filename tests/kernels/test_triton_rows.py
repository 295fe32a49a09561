"""Tests of the Triton kernels: output and every gradient, compared with the formula in float64.

On a CPU, Triton's interpreter runs them on small shapes. A GPU also runs the released shapes.
"""

from pathlib import Path

import pytest
import torch
from layer_inputs import outputs_and_gradients, random_layers, relative_errors, to_float64
from safetensors.torch import load_file
from torch import Tensor

from tokengrow.kernels import triton_rows
from tokengrow.kernels.dispatch import pattention
from tokengrow.kernels.reference import ACTIVATIONS, Operands, pattention_reference

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    # Odds too large for float32 correctly give a probability of 0; NumPy warns about them.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
]

GOLDEN = Path(__file__).parents[1] / "golden"
FIGURES = sorted(GOLDEN.glob("C_pattention_*.safetensors"))

# Error relative to the norm of the reference: float32 sums, and 8 and 11 bits in scores, weights
# and output. Twice the error of the plain formula in this dtype on this device is allowed if that
# is larger, because softmax turns the rounding of a large score into a relative error of a weight.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
ODD_SHAPES = [(1, 5, 3, 4), (7, 33, 19, 21), (5, 16, 24, 8), (2, 8, 129, 3)]
RELEASED_SHAPES = [(300, 768, 768, 768), (257, 768, 3072, 768), (129, 1536, 6144, 1536)]
RELEASED_SHAPES += [(65, 768, 34480, 768)]  # the longest rows of the paper do not fit in registers


def assert_near_float64(x: Tensor, layers: list[Operands], activation: str) -> None:
    """Compare output and every gradient of the kernels with float64."""
    exact = outputs_and_gradients(*to_float64(x, layers), activation, "reference")
    triton = outputs_and_gradients(x, layers, activation, "triton")
    plain = outputs_and_gradients(x, layers, activation, "reference")
    errors = zip(relative_errors(triton, exact), relative_errors(plain, exact), strict=True)
    for error, plain_error in errors:
        assert error <= max(TOLERANCE[x.dtype], 2 * plain_error)


@DTYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_output_and_every_gradient_on_odd_shapes(
    shape: tuple[int, int, int, int], activation: str, dtype: torch.dtype, device: str
) -> None:
    assert_near_float64(*random_layers(shape, dtype, device), activation)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@DTYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", RELEASED_SHAPES, ids=str)
def test_output_and_every_gradient_on_released_shapes(
    shape: tuple[int, int, int, int],
    activation: str,
    dtype: torch.dtype,
    device: str,
) -> None:
    assert_near_float64(*random_layers(shape, dtype, device), activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_parameter_token(activation: str, device: str) -> None:
    # The only score, 3, has norm 3: weight gelu(1), 1 or softmax(3) = 1. The weight does not depend
    # on the score, so the gradients of x and of the key are 0.
    x, key, value = (torch.full((1, 1), number, device=device) for number in (3.0, 1.0, 1.0))
    leaves = [x.requires_grad_(), key.requires_grad_(), value.requires_grad_()]
    out = pattention(*leaves, activation, 1.0, "triton")
    out.backward()
    expected = {"l2_norm_gelu": 0.8413447, "gelu_l2_norm": 1.0, "softmax": 1.0}[activation]
    assert out.item() == pytest.approx(expected, rel=1e-6)
    assert [leaf.grad.item() for leaf in leaves] == pytest.approx([0, 0, expected], abs=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("file", FIGURES, ids=lambda file: file.stem)
def test_published_figures(file: Path, activation: str, device: str) -> None:
    figures = load_file(file, device=device)
    x, key, value = (figures[name].requires_grad_() for name in ("x", "key", "value"))
    out = pattention(x, key, value, activation, len(key) ** 0.5, "triton")
    (out * figures["R"]).sum().backward()
    actual = {"out": out, "grad_x": x.grad, "grad_key": key.grad, "grad_value": value.grad}
    for name, tensor in actual.items():
        reference = figures[f"{activation}.f32.{name}"]
        bound = 5e-6 * max(1.0, reference.abs().max().item())
        assert (tensor - reference).abs().max().item() <= bound, name


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(5, 16, 24, 8), (3, 8, 40, 8)], ids=str)
def test_grouped_layers_equal_single_ones(
    shape: tuple[int, int, int, int], activation: str, device: str
) -> None:
    x, layers = random_layers(shape, torch.float32, device, count=3)
    assert_near_float64(x, layers, activation)


def test_layers_of_different_sizes_run_one_by_one(device: str) -> None:
    x, (first,) = random_layers((5, 16, 24, 8), torch.float32, device)
    _, (second,) = random_layers((5, 16, 7, 8), torch.float32, device)
    assert_near_float64(x, [first, second], "l2_norm_gelu")


@DTYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_long_rows_are_read_in_chunks(
    activation: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_rows, "MAX_BLOCK", 16)
    monkeypatch.setattr(triton_rows, "CHUNK", 16)
    assert_near_float64(*random_layers((5, 16, 53, 8), dtype, device), activation)


@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm"])
def test_zero_row_gives_zeros_and_zero_gradients(activation: str, device: str) -> None:
    x, layers = random_layers((3, 4, 5, 6), torch.float32, device)
    with torch.no_grad():
        x[1] = 0.0
    out, x_grad, *_ = outputs_and_gradients(x, layers, activation, "triton")
    assert not out[1].any() and not x_grad[1].any()
    assert out[[0, 2]].all() and x_grad[[0, 2]].any(1).all()


@pytest.mark.parametrize("size", [1e-25, 1e-3, 1e4, 1e18, 1e30])
def test_squares_of_scores_do_not_overflow_or_vanish(size: float, device: str) -> None:
    # The weights do not depend on the size of the scores, and 1e30 squared is not a float32.
    scores = torch.tensor([[[3.0, 4.0, 0.0]]], device=device) * size
    weights, _ = triton_rows.rows_forward(scores, "l2_norm_gelu", [5.0])
    # A row below the smallest norm counts as zero: see kernels/README.md.
    expected = [0.0] * 3 if size < 1e-12 else [2.9959503, 3.9998733, 0.0]
    assert weights.flatten().tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_softmax_of_huge_scores(dtype: torch.dtype, device: str) -> None:
    scores = torch.tensor([[[3e4, 3e4, -3e4, 0.0]]], device=device).to(dtype)
    weights, _ = triton_rows.rows_forward(scores, "softmax", [2.0])
    assert weights.flatten().tolist() == [2.0, 2.0, 0.0, 0.0]  # tau² / 2 each


def test_empty_input_gives_an_empty_output(device: str) -> None:
    x, layers = random_layers((3, 4, 5, 6), torch.float32, device)
    key, value, tau = layers[0]
    out = pattention(x[:0], key, value, "l2_norm_gelu", tau, "triton")
    out.sum().backward()
    assert out.shape == (0, 6) and not key.grad.any() and not value.grad.any()


def test_error_of_the_normal_cdf_polynomial() -> None:
    # gelu(u) = u Phi(u); in half precision the kernel uses a polynomial in u² instead of erf.
    u = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    y = u * u
    p0, p1, p2, p3 = (getattr(triton_rows, f"P{i}").value for i in range(4))
    actual = 1 / (1 + torch.exp2(-u * (((y * p3 + p2) * y + p1) * y + p0)))
    exact = torch.special.ndtr(u)
    assert (u * (actual - exact)).abs().max() < 7.5e-5
    near = u > -6
    assert (actual[near] / exact[near] - 1).abs().max() < 6e-3


def test_two_runs_give_the_same_bits(device: str) -> None:
    x, layers = random_layers((7, 33, 19, 21), torch.bfloat16, device)
    first, second = (outputs_and_gradients(x, layers, "l2_norm_gelu", "triton") for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_reference_gives_zeros_where_squares_overflow() -> None:
    # In float32 the squares overflow in the reference, but not in the kernels.
    x, key, value = torch.full((1, 1), 1e30), torch.ones(2, 1), torch.ones(2, 1)
    assert pattention_reference(x, key, value, "l2_norm_gelu", 1.0).item() == 0.0
