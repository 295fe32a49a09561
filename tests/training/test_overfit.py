"""Can it learn at all? One batch of real text, by heart."""

from collections.abc import Callable

import torch

from tokengrow.data.sequences import Sequences
from tokengrow.data.store import TokenStore
from tokengrow.distributed.fabric import FabricConfig, build_fabric
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import TokenFormer
from tokengrow.optim.config import OptimConfig, build_optimizer
from tokengrow.training.module import TokenFormerModule


def test_one_batch_of_real_text_is_learned_by_heart(
    tiny_model: Callable[..., ModelConfig], store: TokenStore
) -> None:
    sequences = Sequences(store.split("train"), context_length=32)
    batch = torch.stack([sequences[index] for index in range(4)])  # [4, 33]
    model = TokenFormer(tiny_model(32, width=64))
    model.init_weights(torch.Generator().manual_seed(0))
    optim = OptimConfig(lr=1e-2, weight_decay=0.0)
    fabric = build_fabric(FabricConfig(accelerator="cpu"))
    module = fabric.setup_module(TokenFormerModule(model, optim, updates=200))
    optimizer = fabric.setup_optimizers(build_optimizer(model, optim))
    for update in range(200):
        loss = module.training_step(batch, update)
        fabric.backward(loss)
        fabric.clip_gradients(module, optimizer, max_norm=optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1
