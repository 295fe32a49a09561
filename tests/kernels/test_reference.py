"""Tests of Pattention in plain PyTorch: published figures and edge cases."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tokengrow.kernels.dispatch import pattention
from tokengrow.kernels.reference import ACTIVATIONS

FIGURES = sorted((Path(__file__).parents[1] / "golden").glob("C_pattention_*.safetensors"))
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-11}
PRECISION = {"f32": torch.float32, "f64": torch.float64}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("precision", PRECISION)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("file", FIGURES, ids=lambda file: file.stem)
def test_output_and_gradients_equal_the_published_ones(
    file: Path, activation: str, precision: str
) -> None:
    figures, dtype = load_file(file), PRECISION[precision]
    x, key, value = (figures[name].to(dtype).requires_grad_() for name in ("x", "key", "value"))
    out = pattention(x, key, value, activation, tau=len(key) ** 0.5)
    (out * figures["R"]).sum().backward()
    actual = {"out": out, "grad_x": x.grad, "grad_key": key.grad, "grad_value": value.grad}
    for name, tensor in actual.items():
        reference = figures[f"{activation}.{precision}.{name}"]
        assert tensor is not None and tensor.dtype == dtype
        bound = TOLERANCE[dtype] * max(1.0, reference.abs().max().item())
        assert (tensor - reference).abs().max().item() <= bound, name


def test_all_three_published_shapes_are_tested() -> None:
    assert [file.stem.removeprefix("C_pattention_") for file in FIGURES] == [
        "1x16x8x24",
        "33x64x96x64_init",
        "7x33x19x21",
    ]


@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm"])
def test_zero_row_of_scores_gives_zeros(activation: str) -> None:
    x = randn(3, 4)
    x[1] = 0.0
    out = pattention(x, randn(5, 4, seed=1), randn(5, 6, seed=2), activation, tau=5**0.5)
    assert torch.equal(out[1], torch.zeros(6))
    assert (out[[0, 2]] != 0).all()


@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm"])
def test_zero_row_of_scores_gives_a_zero_gradient(activation: str) -> None:
    x, key, value = randn(3, 4), randn(5, 4, seed=1), randn(5, 6, seed=2)
    x[1] = 0.0
    leaves = [tensor.requires_grad_() for tensor in (x, key, value)]
    pattention(*leaves, activation, tau=5**0.5).sum().backward()
    assert torch.equal(x.grad[1], torch.zeros(4))


@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm"])
def test_zero_row_does_not_change_other_gradients(activation: str) -> None:
    x, key, value = randn(3, 4), randn(5, 4, seed=1), randn(5, 6, seed=2)
    x[1] = 0.0

    def gradients(rows: Tensor) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (key, value)]
        pattention(rows, *leaves, activation, tau=5**0.5).sum().backward()
        return [leaf.grad for leaf in leaves]

    for with_zeros, without in zip(gradients(x), gradients(x[[0, 2]]), strict=True):
        torch.testing.assert_close(with_zeros, without)


def test_softmax_does_not_overflow() -> None:
    # Scores 1e4 and 0: the published exp(x) / sum is NaN, the weights are [1, 0] times N = 2.
    x, key, value = torch.tensor([[1e4]]), torch.tensor([[1.0], [0.0]]), torch.tensor([[3.0], [5]])
    assert pattention(x, key, value, "softmax", tau=2**0.5).item() == pytest.approx(6.0)


def test_softmax_of_equal_scores_sums_the_values() -> None:
    # Two keys of score 0 have weight 1/2 each, times tau² = 2: the sum of the values.
    out = pattention(
        torch.ones(1, 1), torch.zeros(2, 1), torch.tensor([[3.0], [5]]), "softmax", 2**0.5
    )
    assert out.item() == pytest.approx(8.0)


def test_l2_norm_gelu_by_hand() -> None:
    # Scores [3, 4], norm 5, tau 5: gelu(3) = 3 * 0.9986501 and gelu(4) = 4 * 0.99996833.
    x, key, value = torch.ones(1, 1), torch.tensor([[3.0], [4.0]]), torch.eye(2)
    out = pattention(x, key, value, "l2_norm_gelu", tau=5.0)
    assert out[0].tolist() == pytest.approx([2.9959503, 3.9998733], rel=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e4])
def test_l2_norm_gelu_is_scale_invariant(scale: float) -> None:
    x, key, value = (randn(*s, dtype=torch.float64) for s in ((7, 8), (5, 8), (5, 6)))
    out = pattention(x, key, value, "l2_norm_gelu", tau=2.0)
    torch.testing.assert_close(
        pattention(x * scale, key, value, "l2_norm_gelu", tau=2.0), out, rtol=1e-13, atol=1e-13
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bfloat16_output_is_close_to_float32(activation: str) -> None:
    tensors = [t.bfloat16() for t in (randn(9, 32), randn(24, 32, seed=1), randn(24, 16, seed=2))]
    out = pattention(*tensors, activation, tau=24**0.5)
    exact = pattention(*(t.float() for t in tensors), activation, tau=24**0.5)
    assert out.dtype == torch.bfloat16
    # Scores, weights and output are rounded to 8 bits each.
    assert (out.float() - exact).norm() / exact.norm() < 3 * 2**-8


@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm"])
def test_norm_of_bfloat16_scores_is_in_float32(activation: str) -> None:
    # 4096 scores of 1: a bfloat16 sum of squares stops growing at 256.
    ones = torch.ones(1, 1, dtype=torch.bfloat16)
    key, value = (torch.ones(4096, 1, dtype=torch.bfloat16) for _ in range(2))
    out = pattention(ones, key, value, activation, tau=64.0)
    # Each score becomes 1 / 64 * 64 = 1; l2_norm_gelu applies gelu to it, and gelu(1) = 0.8413.
    expected = 4096 * (0.8413447 if activation == "l2_norm_gelu" else 1.0)
    assert out.item() == pytest.approx(expected, rel=2**-7)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_parameter_token_and_one_input_token(activation: str) -> None:
    # The only score, 3, has norm 3: weight f = gelu(1), 1 or softmax(3) = 1.
    out = pattention(torch.tensor([[3.0]]), torch.ones(1, 1), torch.ones(1, 1), activation, 1.0)
    expected = {"l2_norm_gelu": 0.8413447, "gelu_l2_norm": 1.0, "softmax": 1.0}
    assert out.tolist() == [[pytest.approx(expected[activation], rel=1e-6)]]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_leading_dimensions_are_flattened(activation: str) -> None:
    x, key, value = randn(2, 3, 4, 8), randn(5, 8, seed=1), randn(5, 6, seed=2)
    out = pattention(x, key, value, activation, tau=2.0)
    rows = pattention(x.reshape(24, 8), key, value, activation, tau=2.0)
    torch.testing.assert_close(out, rows.reshape(2, 3, 4, 6))


@pytest.mark.parametrize(
    ("x", "key", "value", "message"),
    [
        ((2, 4), (3, 4), (5, 6), r"must have the same N, got \[3, 4\] and \[5, 6\]\."),
        ((2, 4), (3, 7), (3, 6), r"must have the same D, got 4 and 7\."),
        ((2, 4), (4,), (3, 6), "same N"),
        ((2, 4), (3, 4), (3,), "same N"),
    ],
)
def test_mismatched_shapes_are_refused(
    x: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pattention(torch.ones(x), torch.ones(key), torch.ones(value), "l2_norm_gelu", 1.0)


def test_unknown_activation_is_refused_with_the_valid_ones() -> None:
    with pytest.raises(
        ValueError,
        match="activation must be one of l2_norm_gelu, gelu_l2_norm, softmax, got 'relu'",
    ):
        pattention(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1), "relu", 1.0)
