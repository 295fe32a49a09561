"""The memory that `plan` promises, held against what autograd saves and what lies on the disk."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tokengrow.checkpoint.layout import OPTIMIZER, WEIGHTS
from tokengrow.data.store import TokenStore
from tokengrow.distributed.fabric import FabricConfig, build_fabric
from tokengrow.kernels.naive import ACTIVATIONS
from tokengrow.model.config import ModelConfig, Tokens
from tokengrow.model.tokenformer import TokenFormer
from tokengrow.training.fit import fit
from tokengrow.training.ladder import StageConfig, TrainConfig
from tokengrow.training.memory import (
    activation_bytes,
    checkpoint_bytes,
    copy_bytes,
    training_memory,
)
from tokengrow.training.module import TokenFormerModule, next_token_loss
from tokengrow.training.optim import OptimConfig


def shape(
    vocab_size: int, context_length: int, layers: int, width: int, heads: int, tokens: int
) -> ModelConfig:
    counts = Tokens(query=tokens, key=tokens, value=tokens, output=tokens, ffn=4 * tokens)
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


def saved_bytes(config: ModelConfig, batch: int, precision: str) -> int:
    """Bytes of all storages, but the parameters', that one forward pass leaves to the backward."""
    model = TokenFormer(config).to(torch.bfloat16 if precision == "bf16-true" else torch.float32)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: list[Tensor] = []  # alive, or their addresses would be used again
    ids = torch.randint(config.vocab_size, (batch, config.context_length + 1))

    def keep(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"),
    ):
        next_token_loss(model(ids[:, :-1]), ids[:, 1:])
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    return sum(size for address, size in storages.items() if address not in parameters)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("config", "batch"), SHAPES.values(), ids=SHAPES)
def test_activations_are_estimated_within_2_percent(
    config: ModelConfig, batch: int, activation: str, precision: str
) -> None:
    config = replace(config, activation=activation)
    kept = activation_bytes(config, batch, precision) + copy_bytes(config, precision)
    assert kept == pytest.approx(saved_bytes(config, batch, precision), rel=0.02)


def test_autocast_copies_every_weight_but_the_norms(
    tiny_model: Callable[..., ModelConfig],
) -> None:
    config = tiny_model()
    assert copy_bytes(config, "bf16-mixed") == 2 * (config.num_parameters() - 2 * 32)
    assert copy_bytes(config, "32-true") == copy_bytes(config, "bf16-true") == 0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_checkpoints_files_are_as_large_as_planned(
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
def test_weights_gradients_and_moments_are_as_large_as_fabric_makes_them(
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


def test_a_training_step_holds_the_sum_of_its_parts(
    tiny_model: Callable[..., ModelConfig],
) -> None:
    config = tiny_model()
    held = training_memory(config, 3, "bf16-mixed")
    activations = activation_bytes(config, 3, "bf16-mixed")
    copies = copy_bytes(config, "bf16-mixed")
    assert held.total == 4 * 4 * config.num_parameters() + copies + activations


def test_activations_grow_with_the_batch_and_copies_do_not(
    tiny_model: Callable[..., ModelConfig],
) -> None:
    one, six = (training_memory(tiny_model(), batch, "bf16-mixed") for batch in (1, 6))
    assert six.activations == 6 * one.activations
    assert six.copies == one.copies
