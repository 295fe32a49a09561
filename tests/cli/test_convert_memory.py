"""What a conversion holds in memory: the weights once, however they are read and written."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tokengrow.checkpoint.neox import official_names
from tokengrow.model.config import ModelConfig, Tokens
from tokengrow.model.tokenformer import weight_shapes

MEASURED = """
import resource, subprocess, sys
subprocess.run([sys.executable, "-m", "tokengrow", *sys.argv[1:]], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def published(path: Path, config: ModelConfig) -> Path:
    shapes, names = weight_shapes(config), official_names(config)
    torch.save({theirs: torch.rand(shapes[ours]) for ours, theirs in names.items()}, path)
    return path


def peak(folder: Path, source: Path, to: str) -> int:
    """Bytes that `tokengrow convert` has resident at its height, in a process of its own."""
    arguments = [f"source={source}", f"config={source.with_suffix('.yml')}", f"to={to}"]
    command = [sys.executable, "-c", MEASURED, "convert", *arguments, f"out={folder / to}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1]) * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.parametrize("to", ["tokengrow", "neox", "hf"])
def test_the_weights_are_in_memory_once(tmp_path: Path, to: str) -> None:
    peaks, sizes = [], []
    for name, rows in (("small", 16), ("large", 50_000)):
        config = ModelConfig(
            vocab_size=rows,
            context_length=8,
            layers=1,
            width=512,
            heads=2,
            tokens=Tokens(query=8, key=8, value=8, output=8, ffn=rows),
        )
        source = published(tmp_path / f"{name}.bin", config)
        (tmp_path / f"{name}.yml").write_text(
            "{num_layers: 1, hidden_size: 512, num_attention_heads: 2, qkv_slot_num: 8, "
            f"proj_slot_num: 8, ffn_slot_num: {rows}, seq_length: 8, pos_emb: rotary, "
            "rotary_pct: 0.25, norm: layernorm_nonparam, final_norm: layernorm, "
            'attention_config: [[["tokenformer"], 1]], norm_activation_type: l2_norm_gelu}'
        )
        (tmp_path / name).mkdir()
        peaks.append(peak(tmp_path / name, source, to))
        sizes.append(source.stat().st_size)
    assert sizes[1] > 300e6
    assert peaks[1] - peaks[0] <= 1.1 * (sizes[1] - sizes[0])
