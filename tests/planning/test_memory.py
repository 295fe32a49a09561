"""Planned memory, compared with the tensors that autograd saves and the files on disk."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tokengrow.checkpoint.layout import OPTIMIZER, WEIGHTS
from tokengrow.data.store import TokenStore
from tokengrow.distributed.fabric import FabricConfig, build_fabric
from tokengrow.kernels.reference import ACTIVATIONS
from tokengrow.model.architectures import build_model
from tokengrow.model.config import LanguageModelConfig, ModelConfig, ParameterTokens
from tokengrow.model.tokenformer import TokenFormer
from tokengrow.model.transformer import TransformerConfig
from tokengrow.optim.config import OptimConfig
from tokengrow.planning.memory import (
    activation_bytes,
    checkpoint_bytes,
    copy_bytes,
    training_memory,
)
from tokengrow.training.config import StageConfig, TrainConfig
from tokengrow.training.module import TokenFormerModule
from tokengrow.training.trainer import fit


def shape(
    vocab_size: int, context_length: int, layers: int, width: int, heads: int, tokens: int
) -> ModelConfig:
    """Return a config with the same number of tokens in all attention roles."""
    counts = ParameterTokens(query=tokens, key=tokens, value=tokens, output=tokens, ffn=4 * tokens)
    return ModelConfig(
        vocab_size=vocab_size,
        context_length=context_length,
        layers=layers,
        width=width,
        heads=heads,
        tokens=counts,
    )


SHAPES = {
    "quickstart-small": (shape(2048, 128, 4, 128, 4, 64), 4),
    "quickstart-large": (shape(2048, 128, 4, 128, 4, 256), 4),
    "150m-at-a-quarter": (shape(4096, 256, 3, 192, 3, 192), 2),
    "few-tokens": (shape(512, 64, 2, 256, 8, 32), 2),
}


PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


def saved_bytes(config: LanguageModelConfig, batch: int, precision: str, kernel: str) -> int:
    """Return the bytes that a forward pass saves for the backward pass, without parameters."""
    model = build_model(config).to(torch.bfloat16 if precision == "bf16-true" else torch.float32)
    model.set_kernel(kernel)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: list[Tensor] = []  # keeps them alive, so that their addresses are not reused
    ids = torch.randint(config.vocab_size, (batch, config.context_length + 1))

    def keep(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"),
    ):
        model(ids[:, :-1], targets=ids[:, 1:])
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    return sum(size for address, size in storages.items() if address not in parameters)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("config", "batch"), SHAPES.values(), ids=SHAPES)
def test_activations_are_within_2_percent(
    config: ModelConfig, batch: int, activation: str, precision: str
) -> None:
    config = replace(config, activation=activation)
    kept = activation_bytes(config, batch, precision, fused=False)
    kept += copy_bytes(config, precision, fused=False)
    assert kept == pytest.approx(saved_bytes(config, batch, precision, "reference"), rel=0.02)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("config", "batch"),
    [(shape(512, 64, 2, 256, 8, 32), 1), (shape(512, 32, 2, 32, 2, 64), 1)],
    ids=["wide", "many-tokens"],
)
def test_activations_of_fused_kernels_are_within_2_percent(
    config: ModelConfig, batch: int, precision: str
) -> None:
    # The head is fused only on a GPU. The difference of two depths contains only blocks.
    def held(layers: int) -> tuple[int, int]:
        deep = replace(config, layers=layers)
        kept = activation_bytes(deep, batch, precision, fused=True)
        kept += copy_bytes(deep, precision, fused=True)
        return kept, saved_bytes(deep, batch, precision, "triton")

    (kept, saved), (kept_more, saved_more) = held(1), held(3)
    assert kept_more - kept == pytest.approx(saved_more - saved, rel=0.02)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("changes", [{}, {"tied": False, "mlp_width": 320}], ids=["tied", "untied"])
@pytest.mark.parametrize(("config", "batch"), SHAPES.values(), ids=SHAPES)
def test_activations_of_transformer_are_within_2_percent(
    config: ModelConfig, batch: int, changes: dict[str, Any], precision: str
) -> None:
    beside = replace(TransformerConfig.matching(config), **changes)
    kept = activation_bytes(beside, batch, precision, fused=False)
    kept += copy_bytes(beside, precision, fused=False)
    assert kept == pytest.approx(saved_bytes(beside, batch, precision, "auto"), rel=0.02)


@pytest.mark.parametrize(
    ("kernel", "precision", "fused"),
    [
        ("auto", "bf16-mixed", True),
        ("auto", "32-true", False),
        ("triton", "32-true", True),
        ("reference", "bf16-true", False),
        ("compiled", "bf16-true", False),
    ],
)
def test_kernel_auto_is_fused_in_bfloat16(
    kernel: str, precision: str, fused: bool, tiny_model: Callable[..., ModelConfig]
) -> None:
    held = training_memory(tiny_model(), 3, precision, kernel)
    assert held.activations == activation_bytes(tiny_model(), 3, precision, fused)


def test_autocast_copies_all_weights_except_norms(
    tiny_model: Callable[..., ModelConfig],
) -> None:
    config = tiny_model()
    assert copy_bytes(config, "bf16-mixed", fused=True) == 2 * (config.num_parameters() - 2 * 32)
    assert copy_bytes(config, "32-true", fused=False) == 0


def test_fused_kernels_concatenate_three_keys(tiny_model: Callable[..., ModelConfig]) -> None:
    # Two layers of three keys [8, 32], four bytes per element.
    assert copy_bytes(tiny_model(8), "32-true", fused=True) == 2 * 3 * 8 * 32 * 4
    unequal = replace(
        tiny_model(8), tokens=ParameterTokens(query=8, key=8, value=9, output=8, ffn=16)
    )
    assert copy_bytes(unequal, "32-true", fused=True) == 0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_checkpoint_files_have_the_planned_size(
    precision: str,
    tiny_run: Callable[..., TrainConfig],
    tiny_model: Callable[..., ModelConfig],
    store: TokenStore,
    tmp_path: Path,
) -> None:
    model = tiny_model(128, width=128)
    stage = StageConfig(name="only", steps=1, model=model, optim=OptimConfig())
    fabric = FabricConfig(accelerator="cpu", precision=precision)
    run = tiny_run(tmp_path / "run", stages=(stage,), fabric=fabric)
    folder = fit(run, store).checkpoint.folder
    assert folder is not None
    written = sum((folder / name).stat().st_size for name in (WEIGHTS, OPTIMIZER))
    assert checkpoint_bytes(model, precision) == pytest.approx(written, rel=0.02)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_gradients_and_moments_match_fabric(
    precision: str, tiny_model: Callable[..., ModelConfig]
) -> None:
    config = tiny_model()
    fabric = build_fabric(FabricConfig(accelerator="cpu", precision=precision))
    module = fabric.setup_module(TokenFormerModule(TokenFormer(config), OptimConfig(), 1))
    optimizer = fabric.setup_optimizers(module.configure_optimizers()["optimizer"])
    fabric.backward(module(torch.zeros(1, 4, dtype=torch.int64)).sum())
    optimizer.step()
    held = training_memory(config, 1, precision)
    parameters = list(module.parameters())
    assert held.weights == sum(p.nbytes for p in parameters)
    assert held.gradients == sum(p.grad.nbytes for p in parameters)
    states = optimizer.state.values()
    assert held.moments == sum(s["exp_avg"].nbytes + s["exp_avg_sq"].nbytes for s in states)


def test_total_is_the_sum_of_the_parts(
    tiny_model: Callable[..., ModelConfig],
) -> None:
    config = tiny_model()
    held = training_memory(config, 3, "bf16-mixed")
    activations = activation_bytes(config, 3, "bf16-mixed", fused=True)
    copies = copy_bytes(config, "bf16-mixed", fused=True)
    assert held.total == 4 * 4 * config.num_parameters() + copies + activations


def test_activations_grow_with_the_batch_and_copies_do_not(
    tiny_model: Callable[..., ModelConfig],
) -> None:
    one, six = (training_memory(tiny_model(), batch, "bf16-mixed") for batch in (1, 6))
    assert six.activations == 6 * one.activations
    assert six.copies == one.copies
