"""Products in float8, on the CPU's own float8 products."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_triton import errors, learn, random_layers, wide

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
    # torchao registers an enumeration that this torch knows by itself.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_and_gradients_are_near_to_the_width_of_a_float8(activation: str) -> None:
    x, layers = random_layers((48, 64, 96, 32), torch.bfloat16, "cpu")
    found = learn(x, layers, activation, "fp8")
    assert all(tensor.dtype == torch.bfloat16 for tensor in found)
    out, *grads = errors(found, learn(*wide(x, layers), activation, "naive"))
    # Three bits of each factor are kept in the forward pass, two of a gradient.
    assert 0.01 < out < 2**-3 and max(grads) < 2**-2


def test_a_compiled_graph_does_not_break_at_it() -> None:
    x, ((key, value, tau),) = random_layers((48, 64, 96, 32), torch.bfloat16, "cpu")

    def model(x: torch.Tensor) -> torch.Tensor:
        return pattention(x, key, value, "l2_norm_gelu", tau, "fp8")

    out, wanted = torch.compile(model, fullgraph=True)(x), model(x)
    # What is fused rounds to bfloat16 once less, and a number may fall to its other float8.
    assert (out - wanted).float().norm() < 0.02 * wanted.float().norm()


def test_autocast_is_enough() -> None:
    x, layers = random_layers((48, 64, 96, 32), torch.float32, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        out, *grads = learn(x, layers, "l2_norm_gelu", "fp8")
    assert out.dtype == torch.bfloat16 and all(grad.dtype == torch.float32 for grad in grads)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        (
            (4, 64, 96, 32),
            torch.float32,
            r"takes bfloat16, not torch\.float32: set fabric\.precision",
        ),
        (
            (4, 64, 90, 32),
            torch.bfloat16,
            "takes widths and parameter tokens in multiples of 16, not 90",
        ),
    ],
)
def test_what_float8_does_not_take_is_refused(
    shape: tuple[int, int, int, int], dtype: torch.dtype, message: str
) -> None:
    x, ((key, value, tau),) = random_layers(shape, dtype, "cpu")
    with pytest.raises(ValueError, match=f"kernel fp8 {message}"):
        pattention(x, key, value, "l2_norm_gelu", tau, "fp8")


def test_without_torchao_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "HAS_TORCHAO", False)
    x, ((key, value, tau),) = random_layers((4, 64, 96, 32), torch.bfloat16, "cpu")
    with pytest.raises(ValueError, match=r"needs torchao: pip install 'tokengrow\[fp8\]'"):
        pattention(x, key, value, "l2_norm_gelu", tau, "fp8")


def test_a_run_is_refused_before_anything_is_written(
    tiny_run: Callable[..., TrainConfig], store: TokenStore, tmp_path: Path
) -> None:
    out, fabric = tmp_path / "run", FabricConfig(accelerator="cpu", precision="bf16-mixed")
    with pytest.raises(UserError, match=r"kernel=fp8 in stage n8: it takes bfloat16"):
        fit(tiny_run(out, kernel="fp8"), store)
    with pytest.raises(
        UserError, match=r"kernel=fp8 in stage n8: it takes .* multiples of 16, not 8"
    ):
        fit(tiny_run(out, kernel="fp8", fabric=fabric), store)
    assert not out.exists()


def test_a_ladder_grows_as_it_does_in_other_precisions(
    tiny_run: Callable[..., TrainConfig], store: TokenStore, tmp_path: Path
) -> None:
    fabric = FabricConfig(accelerator="cpu", precision="bf16-mixed")
    run = tiny_run(tmp_path / "run", rungs=(16, 32), kernel="fp8", fabric=fabric)
    small, large = fit(run, store).state.rungs
    assert large.loss_start == pytest.approx(small.loss_end, abs=2e-2)
    assert large.loss_end < small.loss_start - 0.2
