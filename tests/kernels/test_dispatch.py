"""Tests of the public operator: selection of the kernel, and PyTorch features around it."""

from collections.abc import Callable

import pytest
import torch
from layer_inputs import random_layers
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tokengrow.kernels.cuda_graph import capture_cuda_graph
from tokengrow.kernels.dispatch import Kernel, grouped_pattention, pattention, uses_triton
from tokengrow.kernels.fused import pattention_fused
from tokengrow.kernels.reference import Operands
from tokengrow.model.config import ModelConfig, ParameterTokens
from tokengrow.model.tokenformer import TokenFormer

SHAPE = (5, 16, 24, 8)


def gradients(
    function: Callable[[Tensor], list[Tensor]], x: Tensor, layers: list[Operands]
) -> list[Tensor]:
    """Return the gradients of the sum of sines of all outputs, with respect to every input."""
    inputs = [x, *(tensor for layer in layers for tensor in layer[:2])]
    outs = function(x)
    return list(torch.autograd.grad(sum(out.float().sin().sum() for out in outs), inputs))


def assert_all_close(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("count", [1, 3])
def test_operator_passes_opcheck(count: int, device: str) -> None:
    x, layers = random_layers(SHAPE, torch.float32, device, count)
    keys, values, taus = (list(column) for column in zip(*layers, strict=True))
    torch.library.opcheck(pattention_fused, (x, keys, values, "l2_norm_gelu", taus))


@pytest.mark.parametrize("count", [1, 3])
def test_compiles_to_a_full_graph(count: int, device: str) -> None:
    x, layers = random_layers(SHAPE, torch.float32, device, count)

    def model(x: Tensor) -> list[Tensor]:
        return grouped_pattention(x * 2, layers, "l2_norm_gelu", "triton")

    compiled = torch.compile(model, fullgraph=True)
    assert_all_close(gradients(compiled, x, layers), gradients(model, x, layers))


def test_noncontiguous_rows_are_accepted(device: str) -> None:
    x, layers = random_layers((16, 5, 24, 8), torch.float32, device)

    def model(x: Tensor) -> list[Tensor]:
        return grouped_pattention(x.T.contiguous().T, layers, "l2_norm_gelu", "triton")

    compiled = torch.compile(model, fullgraph=True)
    assert_all_close(gradients(compiled, x, layers), gradients(model, x, layers))


@pytest.mark.parametrize("narrow", ["key", "value", "one value of three"])
def test_autocast_accepts_parameters_of_mixed_dtypes(narrow: str, device: str) -> None:
    x, layers = random_layers(SHAPE, torch.float32, device, 3 if "three" in narrow else 1)
    key, value, tau = layers[0]
    half = (key if narrow == "key" else value).detach().bfloat16().requires_grad_()
    layers[0] = (half, value, tau) if narrow == "key" else (key, half, tau)

    def kernel_gradients(kernel: Kernel) -> list[Tensor]:
        def run(x: Tensor) -> list[Tensor]:
            with torch.autocast(device, torch.bfloat16):
                return grouped_pattention(x, layers, "l2_norm_gelu", kernel)

        return gradients(run, x, layers)

    pairs = zip(kernel_gradients("triton"), kernel_gradients("reference"), strict=True)
    for actual, expected in pairs:
        assert actual.dtype == expected.dtype
        error = (actual.float() - expected.float()).norm()
        assert error < 3e-2 * expected.float().norm()


def test_more_layers_than_a_group_run_one_by_one(device: str) -> None:
    x, layers = random_layers(SHAPE, torch.float32, device, count=4)
    outs = grouped_pattention(x, layers, "l2_norm_gelu", "triton")
    assert_all_close(outs, grouped_pattention(x, layers, "l2_norm_gelu", "reference"))


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooks_of_a_layer_run(kind: str, device: str) -> None:
    tokens = ParameterTokens(query=12, key=12, value=12, output=10, ffn=24)
    sizes = {"vocab_size": 64, "context_length": 8, "layers": 1, "width": 16, "heads": 2}
    model = TokenFormer(ModelConfig(**sizes, tokens=tokens)).to(device)
    model.set_kernel("triton")
    calls: list[int] = []
    layer = model.blocks[0].attention.key
    getattr(layer, f"register_{kind}_hook")(lambda *_: calls.append(1))
    ids = torch.zeros(1, 8, dtype=torch.int64, device=device)
    model(ids, targets=ids).backward()
    assert calls == [1]


def test_compiling_does_not_round_a_python_scale(device: str) -> None:
    x, ((key, value, _),) = random_layers(SHAPE, torch.float32, device)

    def model(x: Tensor) -> Tensor:
        return pattention(x, key, value, "l2_norm_gelu", 7**0.5, "triton")

    assert torch.equal(torch.compile(model, fullgraph=True)(x), model(x))


@pytest.mark.parametrize("count", [1, 3])
def test_autocast_narrows_products_but_not_gradients(count: int, device: str) -> None:
    x, layers = random_layers(SHAPE, torch.float32, device, count)

    def model(x: Tensor) -> list[Tensor]:
        with torch.autocast(device, torch.bfloat16):
            outs = grouped_pattention(x, layers, "l2_norm_gelu", "triton")
        assert all(out.dtype == torch.bfloat16 for out in outs)
        return outs

    def reference(x: Tensor) -> list[Tensor]:
        return grouped_pattention(x, layers, "l2_norm_gelu", "reference")

    pairs = zip(gradients(model, x, layers), gradients(reference, x, layers), strict=True)
    for actual, expected in pairs:
        assert actual.dtype == torch.float32
        assert (actual - expected).norm() < 2e-2 * expected.norm()


def test_activation_checkpointing_gives_the_same_bits(device: str) -> None:
    x, layers = random_layers(SHAPE, torch.float32, device, count=3)

    def model(x: Tensor) -> list[Tensor]:
        return grouped_pattention(x, layers, "l2_norm_gelu", "triton")

    def checkpointed(x: Tensor) -> list[Tensor]:
        return checkpoint(model, x, use_reentrant=False)

    expected = gradients(model, x, layers)
    actual = gradients(checkpointed, x, layers)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_unused_outputs_add_nothing_to_gradients(device: str) -> None:
    x, layers = random_layers(SHAPE, torch.float32, device, count=3)
    first = grouped_pattention(x, layers, "l2_norm_gelu", "triton")[0]
    x_grad, unused = torch.autograd.grad(first.sum(), [x, layers[1][0]])
    single = pattention(x, *layers[0][:2], "l2_norm_gelu", layers[0][2], "triton")
    torch.testing.assert_close(x_grad, *torch.autograd.grad(single.sum(), [x]))
    assert not unused.any()


def test_leading_dimensions_are_flattened_to_rows(device: str) -> None:
    x, ((key, value, tau),) = random_layers((24, 16, 24, 8), torch.float32, device)
    out = pattention(x.view(2, 3, 4, 16), key, value, "l2_norm_gelu", tau, "triton")
    rows = pattention(x, key, value, "l2_norm_gelu", tau, "triton")
    assert torch.equal(out, rows.view(2, 3, 4, 8))


def test_compiled_kernel_equals_the_reference() -> None:
    x, layers = random_layers(SHAPE, torch.float32, "cpu")
    kernels: list[Kernel] = ["compiled", "reference"]
    outs = [grouped_pattention(x, layers, "l2_norm_gelu", kernel)[0] for kernel in kernels]
    torch.testing.assert_close(*outs)


@pytest.mark.parametrize(
    ("kernel", "dtype", "expected"),
    [
        ("auto", torch.float32, False),
        ("reference", torch.float32, False),
        ("triton", torch.float32, True),
    ],
)
def test_auto_is_the_reference_on_a_cpu(kernel: Kernel, dtype: torch.dtype, expected: bool) -> None:
    assert uses_triton(torch.ones(1, dtype=dtype), kernel) is expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.bfloat16, True), (torch.float32, True), (torch.float64, False)]
)
def test_auto_is_triton_on_a_gpu_for_its_dtypes(dtype: torch.dtype, expected: bool) -> None:
    assert uses_triton(torch.ones(1, dtype=dtype, device="cuda"), "auto") is expected


def test_triton_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokengrow.kernels.dispatch._is_interpreted", lambda: False)
    x, ((key, value, tau),) = random_layers(SHAPE, torch.float32, "cpu")
    with pytest.raises(
        ValueError, match=r"kernel=triton needs tensors on a GPU, got cpu\. Set kernel=auto or"
    ):
        pattention(x, key, value, "l2_norm_gelu", tau, "triton")


def test_triton_refuses_float64(device: str) -> None:
    x, ((key, value, tau),) = random_layers(SHAPE, torch.float64, device)
    with pytest.raises(
        ValueError, match=r"needs float32, bfloat16 or float16, got torch\.float64\. Set kernel="
    ):
        pattention(x, key, value, "l2_norm_gelu", tau, "triton")


def test_unknown_kernel_is_refused_with_the_valid_ones() -> None:
    x, ((key, value, tau),) = random_layers(SHAPE, torch.float32, "cpu")
    with pytest.raises(
        ValueError,
        match=r"kernel must be one of auto, reference, compiled, triton, fp8, got 'fast'\.$",
    ):
        pattention(x, key, value, "l2_norm_gelu", tau, "fast")  # type: ignore[arg-type]


def test_renamed_kernel_is_refused_with_its_new_name() -> None:
    x, ((key, value, tau),) = random_layers(SHAPE, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"got 'naive'\. It is called 'reference' now\.$"):
        pattention(x, key, value, "l2_norm_gelu", tau, "naive")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGpu:
    def test_cuda_graph_replays_on_new_inputs(self) -> None:
        x, layers = random_layers(SHAPE, torch.bfloat16, "cuda", count=3)

        def model(x: Tensor) -> list[Tensor]:
            return grouped_pattention(x, layers, "l2_norm_gelu")

        gradients(model, x, layers)
        graph, captured = capture_cuda_graph(
            lambda: gradients(model, x, layers), torch.device("cuda"), warm_ups=0
        )
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        expected = gradients(model, x, layers)
        assert all(torch.equal(*pair) for pair in zip(captured, expected, strict=True))

    def test_backward_saves_two_bytes_per_score(self) -> None:
        t, d, n = 4096, 768, 3072
        x, layers = random_layers((t, d, n, d), torch.bfloat16, "cuda")
        before = torch.cuda.memory_allocated()
        out = grouped_pattention(x, layers, "l2_norm_gelu")[0]
        saved = torch.cuda.memory_allocated() - before - out.nbytes
        assert saved <= 2.1 * t * n
