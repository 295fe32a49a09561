"""The memory that `plan` promises, held against what autograd saves and what lies on the disk."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tokengrow.checkpoint.layout import OPTIMIZER, WEIGHTS
from tokengrow.checkpoint.store import Checkpoint, save_checkpoint
from tokengrow.model.config import ModelConfig, Tokens
from tokengrow.model.tokenformer import TokenFormer
from tokengrow.training.memory import (
    activation_bytes,
    checkpoint_bytes,
    state_bytes,
    training_bytes,
)
from tokengrow.training.module import next_token_loss
from tokengrow.training.optim import OptimConfig, build_optimizer, optimizer_state


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


def saved_bytes(config: ModelConfig, batch: int) -> int:
    """Bytes of all storages, but the parameters', that one forward pass leaves to the backward."""
    model = TokenFormer(config)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: list[Tensor] = []  # alive, or their addresses would be used again
    ids = torch.randint(config.vocab_size, (batch, config.context_length + 1))

    def keep(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        next_token_loss(model(ids[:, :-1]), ids[:, 1:])
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    return sum(size for address, size in storages.items() if address not in parameters)


@pytest.mark.parametrize(("config", "batch"), SHAPES.values(), ids=SHAPES)
def test_activations_are_estimated_within_15_percent(config: ModelConfig, batch: int) -> None:
    assert activation_bytes(config, batch) == pytest.approx(saved_bytes(config, batch), rel=0.15)


def test_a_checkpoints_files_are_as_large_as_planned(tmp_path: Path) -> None:
    model = TokenFormer(shape(2048, 128, 4, 128, 4, 64))
    optimizer = build_optimizer(model, OptimConfig())
    model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
    optimizer.step()
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    checkpoint = Checkpoint(model.config, weights, optimizer_state(model, optimizer))
    folder = save_checkpoint(tmp_path / "step_00000001", checkpoint)
    written = sum((folder / name).stat().st_size for name in (WEIGHTS, OPTIMIZER))
    assert checkpoint_bytes(model.config) == pytest.approx(written, rel=0.02)


def test_training_holds_weights_gradients_two_moments_and_activations(
    tiny_model: Callable[..., ModelConfig],
) -> None:
    config = tiny_model()
    assert state_bytes(config) == 4 * 4 * config.num_parameters()
    assert training_bytes(config, 3) == state_bytes(config) + activation_bytes(config, 3)


def test_activations_grow_with_the_batch(tiny_model: Callable[..., ModelConfig]) -> None:
    assert activation_bytes(tiny_model(), 6) == 6 * activation_bytes(tiny_model(), 1)
