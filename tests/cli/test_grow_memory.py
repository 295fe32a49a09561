"""What a growth holds in memory: one model at a time, and never the optimizer's state."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tokengrow.checkpoint.layout import OPTIMIZER, WEIGHTS
from tokengrow.checkpoint.store import Checkpoint, save_checkpoint
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import TokenFormer


def test_memory_holds_one_model_and_not_the_optimizer_state(
    tmp_path: Path,
    tiny_model: Callable[..., ModelConfig],
    peak_memory: Callable[..., int],
) -> None:
    peaks, sizes = [], []
    for name, n in (("small", 8), ("large", 6_000)):
        config = replace(tiny_model(n), layers=8, width=64, head_dim=32)
        model = TokenFormer(config)
        moments = {
            f"{slot}.{key}": weight.detach().clone()
            for slot in ("exp_avg", "exp_avg_sq")
            for key, weight in model.state_dict().items()
        }
        source = replace(Checkpoint.of(model), optimizer=moments)
        folder = save_checkpoint(tmp_path / name / "source", source)
        out = tmp_path / name / "grown"
        peaks.append(peak_memory("grow", f"source={folder}", f"out={out}", "model.layers=16"))
        files = [out / "step_00000000" / file for file in (WEIGHTS, OPTIMIZER)]
        sizes.append([file.stat().st_size for file in files])
    assert sizes[1][0] > 290e6
    assert sizes[1][1] > 580e6
    assert peaks[1] - peaks[0] < 1.15 * sizes[1][0]
