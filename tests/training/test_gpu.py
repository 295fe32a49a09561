"""The same ladder on a GPU: grown without a jump, resumed with its fused optimizer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tokengrow.checkpoint.layout import OPTIMIZER
from tokengrow.data.store import TokenStore
from tokengrow.distributed.fabric import FabricConfig
from tokengrow.model.tokenformer import TokenFormer
from tokengrow.training.config import TrainConfig
from tokengrow.training.trainer import fit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# bfloat16 keeps 8 bits: a loss near 6 moves by a few thousandths when sums are ordered otherwise.
TOLERANCE = {"32-true": 1e-4, "bf16-mixed": 1e-2}


@pytest.mark.parametrize("precision", TOLERANCE)
def test_the_loss_goes_on_where_the_smaller_model_stood(
    tiny_run: Callable[..., TrainConfig], store: TokenStore, tmp_path: Path, precision: str
) -> None:
    fabric = FabricConfig(accelerator="cuda", precision=precision)
    rungs = fit(tiny_run(tmp_path / "run", fabric=fabric), store).state.rungs
    for rung in rungs[1:]:
        assert rung.loss_start == pytest.approx(rung.loss_before, abs=TOLERANCE[precision])
        assert rung.drift is not None and rung.drift < 1e-10
    assert rungs[-1].loss_end < rungs[0].loss_start


def test_the_fused_optimizer_goes_on_with_its_state(
    tiny_run: Callable[..., TrainConfig], store: TokenStore, tmp_path: Path
) -> None:
    fabric = FabricConfig(accelerator="cuda")
    folder = fit(tiny_run(tmp_path / "run", rungs=(8,), fabric=fabric), store).checkpoint.folder
    longer = tiny_run(tmp_path / "run", rungs=(8, 12), fabric=fabric)
    after = fit(longer, store).checkpoint.folder
    assert folder is not None and after is not None
    name = "step.embedding.weight"
    assert load_file(folder / OPTIMIZER)[name] == 6
    assert load_file(after / OPTIMIZER)[name] == 12


def test_the_gpu_computes_what_the_cpu_computes(tiny_run: Callable[..., TrainConfig]) -> None:
    config = tiny_run(Path("unused")).stages[0].model
    model = TokenFormer(config)
    ids = torch.randint(config.vocab_size, (2, config.context_length))
    here = model(ids)
    there = model.cuda()(ids.cuda()).cpu()
    torch.testing.assert_close(there, here, atol=1e-4, rtol=1e-4)
