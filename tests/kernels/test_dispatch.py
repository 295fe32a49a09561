"""The public operator: what chooses a kernel, and what PyTorch may do around it."""

import pytest
import torch
from test_triton import random_layers
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tokengrow.kernels.dispatch import is_fused, pattention, pattentions
from tokengrow.kernels.fused import pattention_fused
from tokengrow.model.config import ModelConfig, Tokens
from tokengrow.model.tokenformer import TokenFormer

SHAPE = (5, 16, 24, 8)


def gradients(
    function: object, x: Tensor, layers: list[tuple[Tensor, Tensor, float]]
) -> list[Tensor]:
    """Of the sum of sines of all outputs, with respect to every input."""
    inputs = [x, *(each for layer in layers for each in layer[:2])]
    outs = function(x)
    return list(torch.autograd.grad(sum(out.float().sin().sum() for out in outs), inputs))


def assert_same(found: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-5) -> None:
    for mine, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("count", [1, 3])
def test_what_pytorch_asks_of_an_operator(count: int, device: str) -> None:
    x, layers = random_layers(SHAPE, torch.float32, device, count)
    keys, values, taus = (list(each) for each in zip(*layers, strict=True))
    torch.library.opcheck(pattention_fused, (x, keys, values, "l2_norm_gelu", taus))


@pytest.mark.parametrize("count", [1, 3])
def test_a_compiled_graph_does_not_break_at_it(count: int, device: str) -> None:
    x, layers = random_layers(SHAPE, torch.float32, device, count)

    def model(x: Tensor) -> list[Tensor]:
        return pattentions(x * 2, layers, "l2_norm_gelu", "triton")

    compiled = torch.compile(model, fullgraph=True)
    assert_same(gradients(compiled, x, layers), gradients(model, x, layers))


def test_rows_that_lie_across_memory_are_rows(device: str) -> None:
    x, layers = random_layers((16, 5, 24, 8), torch.float32, device)

    def model(x: Tensor) -> list[Tensor]:
        return pattentions(x.T.contiguous().T, layers, "l2_norm_gelu", "triton")

    compiled = torch.compile(model, fullgraph=True)
    assert_same(gradients(compiled, x, layers), gradients(model, x, layers))


@pytest.mark.parametrize("narrow", ["key", "value", "one value of three"])
def test_parameters_of_different_dtypes_go_together_under_autocast(
    narrow: str, device: str
) -> None:
    x, layers = random_layers(SHAPE, torch.float32, device, 3 if "three" in narrow else 1)
    key, value, tau = layers[0]
    half = (key if narrow == "key" else value).detach().bfloat16().requires_grad_()
    layers[0] = (half, value, tau) if narrow == "key" else (key, half, tau)

    def model(kernel: str) -> list[Tensor]:
        def run(x: Tensor) -> list[Tensor]:
            with torch.autocast(device, torch.bfloat16):
                return pattentions(x, layers, "l2_norm_gelu", kernel)

        return gradients(run, x, layers)

    for mine, plain in zip(model("triton"), model("naive"), strict=True):
        assert mine.dtype == plain.dtype
        assert (mine.float() - plain.float()).norm() < 3e-2 * plain.float().norm()


def test_more_layers_than_go_together_go_one_by_one(device: str) -> None:
    x, layers = random_layers(SHAPE, torch.float32, device, count=4)
    outs = pattentions(x, layers, "l2_norm_gelu", "triton")
    assert_same(outs, pattentions(x, layers, "l2_norm_gelu", "naive"))


@pytest.mark.parametrize("where", ["forward", "forward_pre", "full_backward"])
def test_whoever_hooks_a_layer_sees_it(where: str, device: str) -> None:
    tokens = Tokens(query=12, key=12, value=12, output=10, ffn=24)
    sizes = {"vocab_size": 64, "context_length": 8, "layers": 1, "width": 16, "heads": 2}
    model = TokenFormer(ModelConfig(**sizes, tokens=tokens)).to(device)
    model.set_kernel("triton")
    seen: list[int] = []
    layer = model.blocks[0].attention.key
    getattr(layer, f"register_{where}_hook")(lambda *_: seen.append(1))
    ids = torch.zeros(1, 8, dtype=torch.int64, device=device)
    model(ids, targets=ids).backward()
    assert seen == [1]


def test_a_scale_that_python_holds_is_not_rounded_otherwise_when_compiled(device: str) -> None:
    x, ((key, value, _),) = random_layers(SHAPE, torch.float32, device)

    def model(x: Tensor) -> Tensor:
        return pattention(x, key, value, "l2_norm_gelu", 7**0.5, "triton")

    assert torch.equal(torch.compile(model, fullgraph=True)(x), model(x))


@pytest.mark.parametrize("count", [1, 3])
def test_autocast_narrows_the_products_and_leaves_the_gradients_wide(
    count: int, device: str
) -> None:
    x, layers = random_layers(SHAPE, torch.float32, device, count)

    def model(x: Tensor) -> list[Tensor]:
        with torch.autocast(device, torch.bfloat16):
            outs = pattentions(x, layers, "l2_norm_gelu", "triton")
        assert all(out.dtype == torch.bfloat16 for out in outs)
        return outs

    def wanted(x: Tensor) -> list[Tensor]:
        return pattentions(x, layers, "l2_norm_gelu", "naive")

    found, exact = gradients(model, x, layers), gradients(wanted, x, layers)
    for mine, reference in zip(found, exact, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - reference).norm() < 2e-2 * reference.norm()


def test_activation_checkpointing_computes_the_same(device: str) -> None:
    x, layers = random_layers(SHAPE, torch.float32, device, count=3)

    def model(x: Tensor) -> list[Tensor]:
        return pattentions(x, layers, "l2_norm_gelu", "triton")

    def saved(x: Tensor) -> list[Tensor]:
        return checkpoint(model, x, use_reentrant=False)

    wanted = gradients(model, x, layers)
    assert all(torch.equal(*pair) for pair in zip(gradients(saved, x, layers), wanted, strict=True))


def test_an_output_that_nobody_uses_has_no_part_in_the_gradients(device: str) -> None:
    x, layers = random_layers(SHAPE, torch.float32, device, count=3)
    first = pattentions(x, layers, "l2_norm_gelu", "triton")[0]
    x_grad, unused = torch.autograd.grad(first.sum(), [x, layers[1][0]])
    alone = pattention(x, *layers[0][:2], "l2_norm_gelu", layers[0][2], "triton")
    torch.testing.assert_close(x_grad, *torch.autograd.grad(alone.sum(), [x]))
    assert not unused.any()


def test_leading_dimensions_are_rows(device: str) -> None:
    x, ((key, value, tau),) = random_layers((24, 16, 24, 8), torch.float32, device)
    out = pattention(x.view(2, 3, 4, 16), key, value, "l2_norm_gelu", tau, "triton")
    rows = pattention(x, key, value, "l2_norm_gelu", tau, "triton")
    assert torch.equal(out, rows.view(2, 3, 4, 8))


def test_compiled_is_the_formula() -> None:
    x, layers = random_layers(SHAPE, torch.float32, "cpu")
    outs = [pattentions(x, layers, "l2_norm_gelu", kernel)[0] for kernel in ("compiled", "naive")]
    torch.testing.assert_close(*outs)


@pytest.mark.parametrize(
    ("kernel", "dtype", "fused"),
    [
        ("auto", torch.float32, False),
        ("naive", torch.float32, False),
        ("triton", torch.float32, True),
    ],
)
def test_auto_is_naive_on_a_cpu(kernel: str, dtype: torch.dtype, fused: bool) -> None:
    assert is_fused(torch.ones(1, dtype=dtype), kernel) is fused


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("dtype", "fused"), [(torch.bfloat16, True), (torch.float32, True), (torch.float64, False)]
)
def test_auto_is_triton_on_a_gpu_for_what_it_takes(dtype: torch.dtype, fused: bool) -> None:
    assert is_fused(torch.ones(1, dtype=dtype, device="cuda"), "auto") is fused


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokengrow.kernels.dispatch._interpreted", lambda: False)
    x, ((key, value, tau),) = random_layers(SHAPE, torch.float32, "cpu")
    with pytest.raises(ValueError, match="kernel triton needs tensors on a GPU, not on cpu: take"):
        pattention(x, key, value, "l2_norm_gelu", tau, "triton")


def test_triton_refuses_float64(device: str) -> None:
    x, ((key, value, tau),) = random_layers(SHAPE, torch.float64, device)
    with pytest.raises(
        ValueError, match=r"takes float32, bfloat16 and float16, not torch\.float64"
    ):
        pattention(x, key, value, "l2_norm_gelu", tau, "triton")


def test_an_unknown_kernel_is_refused_with_the_valid_ones() -> None:
    x, ((key, value, tau),) = random_layers(SHAPE, torch.float32, "cpu")
    with pytest.raises(ValueError, match="'fast': valid are auto, naive, compiled, triton, fp8"):
        pattention(x, key, value, "l2_norm_gelu", tau, "fast")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGpu:
    def test_a_cuda_graph_replays_it_on_new_inputs(self) -> None:
        x, layers = random_layers(SHAPE, torch.bfloat16, "cuda", count=3)

        def model(x: Tensor) -> list[Tensor]:
            return pattentions(x, layers, "l2_norm_gelu")

        gradients(model, x, layers)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.graph(graph, stream=stream):
            captured = gradients(model, x, layers)
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        wanted = gradients(model, x, layers)
        assert all(torch.equal(*pair) for pair in zip(captured, wanted, strict=True))

    def test_it_keeps_two_bytes_a_score(self) -> None:
        t, d, n = 4096, 768, 3072
        x, layers = random_layers((t, d, n, d), torch.bfloat16, "cuda")
        before = torch.cuda.memory_allocated()
        out = pattentions(x, layers, "l2_norm_gelu")[0]
        kept = torch.cuda.memory_allocated() - before - out.nbytes
        assert kept <= 2.1 * t * n
