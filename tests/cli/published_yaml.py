"""Published GPT-NeoX configs, as changes of the config of model A."""

import json
from pathlib import Path
from typing import Any

OFFICIAL = Path(__file__).parents[1] / "golden" / "A_tiny_init" / "config.json"
"""Config of model A in the published code; JSON is YAML."""

COMMON_KEYS: dict[str, Any] = {
    "fp16": {
        "fp16": True,
        "enabled": True,
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 12,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "checkpoint_factor": 500,
    "extra_save_iters": [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512],
    "tokenizer-type": "HFTokenizer",
    "vocab-file": "./tokenizer.json",
    "tensorboard_dir": "tensorboard",
    "wandb_host": "https://api.wandb.ai",
    "wandb_project": "neox",
}
PILE = {"data_path": "./data/pile/pile_0.87_deduped_text_document", "keep_last_n_checkpoints": 6}
OWT2 = {"data_path": "./data/openwebtext2/openwebtext2_text_document"}
BASE = OWT2 | {"keep_last_n_checkpoints": 6}
GROWN = OWT2 | {
    "keep_last_n_checkpoints": 4,
    "pretrain_partial_init": "./354M_TokenFormer_Openwebtext2/checkpoints",
}

# Name of the file: (GPUs, layers, width, heads, parameter tokens of attention (the FFN has four
# times as many), context, updates, micro-batch, accumulation, log_interval, other keys).
RUNS: dict[str, tuple[int, int, int, int, int, int, int, int, int, int, dict[str, Any]]] = {
    "150M_train_pile": (8, 12, 768, 12, 768, 2048, 143_000, 32, 4, 1, PILE),
    "450M_train_pile": (16, 24, 1024, 16, 1024, 2048, 143_000, 16, 4, 1, PILE),
    "900M_train_pile": (32, 32, 1280, 16, 1280, 2048, 143_000, 8, 4, 1, PILE),
    "1-5B_train_pile": (64, 40, 1536, 16, 1536, 2048, 143_000, 8, 2, 1, PILE),
    "354M_train_openwebtext2_basemodel": (
        *(16, 24, 1024, 16, 768, 1024, 600_000, 16, 2, 100, BASE),
    ),
    "354M_to_757M_train_openwebtext2_60k": (
        *(64, 24, 1024, 16, 1792, 1024, 60_000, 8, 1, 500, GROWN),
    ),
    "354M_to_757M_train_openwebtext2_120k": (
        *(64, 24, 1024, 16, 1792, 1024, 120_000, 8, 1, 500, GROWN),
    ),
}


def gpus_of(name: str) -> int:
    """Return the number of GPUs of a published run."""
    return RUNS[name][0]


def published(name: str, **changes: Any) -> dict[str, Any]:
    """Return every key of a published config, with some changed."""
    _, layers, width, heads, n, context, updates, micro, accumulated, log, more = RUNS[name]
    differs = {
        "num_layers": layers,
        "attention_config": [[["tokenformer"], layers]],
        "hidden_size": width,
        "num_attention_heads": heads,
        "qkv_slot_num": n,
        "proj_slot_num": n,
        "ffn_slot_num": 4 * n,
        "seq_length": context,
        "max_position_embeddings": context,
        "train_iters": updates,
        "lr_decay_iters": updates,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulated,
        "log_interval": log,
        "steps_per_print": log,
    }
    return {**json.loads(OFFICIAL.read_text()), **COMMON_KEYS, **differs, **more, **changes}
