"""What a conversion holds in memory: the weights once, however they are read and written."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tokengrow.interop.neox import published_names
from tokengrow.model.config import ModelConfig, ParameterTokens
from tokengrow.model.tokenformer import weight_shapes


def published(path: Path, config: ModelConfig) -> Path:
    shapes, names = weight_shapes(config), published_names(config)
    torch.save({theirs: torch.rand(shapes[ours]) for ours, theirs in names.items()}, path)
    return path


@pytest.mark.parametrize("to", ["tokengrow", "neox", "hf"])
def test_the_weights_are_in_memory_once(
    tmp_path: Path, peak_memory: Callable[..., int], to: str
) -> None:
    peaks, sizes = [], []
    for name, rows in (("small", 16), ("large", 50_000)):
        config = ModelConfig(
            vocab_size=rows,
            context_length=8,
            layers=1,
            width=512,
            heads=2,
            tokens=ParameterTokens(query=8, key=8, value=8, output=8, ffn=rows),
        )
        source = published(tmp_path / f"{name}.bin", config)
        (tmp_path / f"{name}.yml").write_text(
            "{num_layers: 1, hidden_size: 512, num_attention_heads: 2, qkv_slot_num: 8, "
            f"proj_slot_num: 8, ffn_slot_num: {rows}, seq_length: 8, pos_emb: rotary, "
            "rotary_pct: 0.25, norm: layernorm_nonparam, final_norm: layernorm, "
            'attention_config: [[["tokenformer"], 1]], norm_activation_type: l2_norm_gelu}'
        )
        (tmp_path / name).mkdir()
        config_file, out = source.with_suffix(".yml"), tmp_path / name / to
        given = [f"source={source}", f"config={config_file}", f"to={to}", f"out={out}"]
        peaks.append(peak_memory("convert", *given))
        sizes.append(source.stat().st_size)
    assert sizes[1] > 300e6
    assert peaks[1] - peaks[0] <= 1.1 * (sizes[1] - sizes[0])
