"""Tests of Pattention with products in float8, on a CPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from layer_inputs import outputs_and_gradients, random_layers, relative_errors, to_float64

from tokengrow.data.store import TokenStore
from tokengrow.distributed.fabric import FabricConfig
from tokengrow.errors import UserError
from tokengrow.kernels import fp8
from tokengrow.kernels.dispatch import pattention
from tokengrow.kernels.reference import ACTIVATIONS
from tokengrow.training.config import TrainConfig
from tokengrow.training.trainer import fit

pytestmark = [
    pytest.mark.skipif(not fp8.HAS_TORCHAO, reason="needs torchao"),
    # torchao registers an enumeration that this version of torch already has.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_errors_match_the_precision_of_float8(activation: str) -> None:
    x, layers = random_layers((48, 64, 96, 32), torch.bfloat16, "cpu")
    actual = outputs_and_gradients(x, layers, activation, "fp8")
    assert all(tensor.dtype == torch.bfloat16 for tensor in actual)
    expected = outputs_and_gradients(*to_float64(x, layers), activation, "reference")
    out, *grads = relative_errors(actual, expected)
    # The forward pass keeps three bits of each factor, and the backward pass two of a gradient.
    assert 0.01 < out < 2**-3 and max(grads) < 2**-2


def test_compiles_to_a_full_graph() -> None:
    x, ((key, value, tau),) = random_layers((48, 64, 96, 32), torch.bfloat16, "cpu")

    def model(x: torch.Tensor) -> torch.Tensor:
        return pattention(x, key, value, "l2_norm_gelu", tau, "fp8")

    out, expected = torch.compile(model, fullgraph=True)(x), model(x)
    # Fused operations round to bfloat16 once less, and a number may round to the other float8.
    assert (out - expected).float().norm() < 0.02 * expected.float().norm()


def test_float32_parameters_work_under_autocast() -> None:
    x, layers = random_layers((48, 64, 96, 32), torch.float32, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        out, *grads = outputs_and_gradients(x, layers, "l2_norm_gelu", "fp8")
    assert out.dtype == torch.bfloat16 and all(grad.dtype == torch.float32 for grad in grads)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        (
            (4, 64, 96, 32),
            torch.float32,
            r"needs bfloat16, got torch\.float32\. Set fabric\.precision=bf16-mixed\.",
        ),
        (
            (4, 64, 90, 32),
            torch.bfloat16,
            r"needs widths and parameter tokens that are multiples of 16, got 90\.",
        ),
    ],
)
def test_unsupported_tensors_are_refused(
    shape: tuple[int, int, int, int], dtype: torch.dtype, message: str
) -> None:
    x, ((key, value, tau),) = random_layers(shape, dtype, "cpu")
    with pytest.raises(ValueError, match=f"kernel=fp8 {message}"):
        pattention(x, key, value, "l2_norm_gelu", tau, "fp8")


def test_missing_torchao_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "HAS_TORCHAO", False)
    x, ((key, value, tau),) = random_layers((4, 64, 96, 32), torch.bfloat16, "cpu")
    with pytest.raises(ValueError, match=r"needs torchao\. Run pip install 'tokengrow\[fp8\]'\."):
        pattention(x, key, value, "l2_norm_gelu", tau, "fp8")


def test_run_is_refused_before_anything_is_written(
    tiny_run: Callable[..., TrainConfig], store: TokenStore, tmp_path: Path
) -> None:
    out, fabric = tmp_path / "run", FabricConfig(accelerator="cpu", precision="bf16-mixed")
    with pytest.raises(UserError, match=r"kernel=fp8 in stage n8: it needs bfloat16"):
        fit(tiny_run(out, kernel="fp8"), store)
    with pytest.raises(
        UserError, match=r"kernel=fp8 in stage n8: it needs .* multiples of 16, got 8"
    ):
        fit(tiny_run(out, kernel="fp8", fabric=fabric), store)
    assert not out.exists()


def test_ladder_grows_in_float8(
    tiny_run: Callable[..., TrainConfig], store: TokenStore, tmp_path: Path
) -> None:
    fabric = FabricConfig(accelerator="cpu", precision="bf16-mixed")
    run = tiny_run(tmp_path / "run", rungs=(16, 32), kernel="fp8", fabric=fabric)
    small, large = fit(run, store).state.rungs
    assert large.loss_start == pytest.approx(small.loss_end, abs=2e-2)
    assert large.loss_end < small.loss_start - 0.2
