"""Each key of a GPT-NeoX YAML: converted into the recipe, listed as inexact, or refused."""

import json
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import yaml
from published_yaml import OFFICIAL, published
from tokenizers import models

from tokengrow.cli.neox_recipe import INHERITED_KEYS, neox_recipe
from tokengrow.data.store import TokenStore
from tokengrow.errors import UserError
from tokengrow.growth.plan import INHERITED_FIELDS
from tokengrow.interop.neox_config import NeoxConfig
from tokengrow.interop.neox_training import NeoxAdam, NeoxOptimizer, NeoxTraining
from tokengrow.training.recipe import resolve_train

Command = Callable[..., Any]
Composed = Callable[..., dict[str, Any]]
WriteYaml = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("somewhere")

PILE = published("150M_train_pile")
"""Published config of the 150M model."""

SECOND_VALUES: dict[str, Any] = {
    "num_layers": 24,
    "hidden_size": 1536,
    "num_attention_heads": 2,
    "qkv_slot_num": 5,
    "proj_slot_num": 6,
    "ffn_slot_num": 7,
    "seq_length": 99,
    "norm_activation_type": "softmax",
    "attention_config": [[["flash"], "all"]],
    "pos_emb": "alibi",
    "rotary_pct": 0.5,
    "rotary_emb_base": 500_000,
    "norm": "rmsnorm",
    "final_norm": "rmsnorm",
    "layernorm_epsilon": 1e-6,
    "no_weight_tying": True,
    "gpt_j_residual": True,
    "use_bias_in_attn_linear": True,
    "sliding_window_width": 16,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "model_parallel_size": 2,
    "pipe_parallel_size": 2,
    "init_method": "small_init",
    "init_method_std": 0.03,
    "output_layer_init_method": "scaled_normal",
    "train_iters": 1000,
    "optimizer.type": "Lion",
    "optimizer.params.lr": 1e-3,
    "optimizer.params.betas": [0.8, 0.9],
    "optimizer.params.eps": 1e-6,
    "min_lr": 1e-5,
    "lr_decay_style": "constant",
    "lr_decay_iters": 1000,
    "warmup": 0.02,
    "weight_decay": 0.2,
    "gradient_clipping": 0.5,
    "train_batch_size": 24,
    "train_micro_batch_size_per_gpu": 3,
    "gradient_accumulation_steps": 3,
    "data_path": "./elsewhere",
    "split": "90,5,5",
    "data_impl": "cached",
    "tokenizer_type": "GPT2BPETokenizer",
    "vocab_file": "./other.json",
    "make_vocab_size_divisible_by": 1000,
    "seed": 7,
    "eval_interval": 11,
    "eval_iters": 12,
    "checkpoint_factor": 13,
    "checkpoint_scale": "log",
    "keep_last_n_checkpoints": 14,
    "log_interval": 15,
    "pretrain_partial_init": "./small",
    "max_position_embeddings": 9999,
    "train_data_paths": ["a", "b"],
    "my_own_key": 1,
}
"""Key to a second value that GPT-NeoX allows: all keys that are read, and some that are not."""


def write_tokenizer(entries: int, path: str = "tokenizer.json") -> str:
    """Write a tokenizer with `entries` entries, one of them an added token; return its path."""
    made = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(entries - 1)}, "w0"))
    made.add_special_tokens(["<|endoftext|>"])
    made.save(path)
    return path


class TestKeys:
    def test_inexact_keys_are_listed_with_a_reason(
        self, command: Command, write_yaml: WriteYaml
    ) -> None:
        adam = {"lr": "6e-4", "max_grad_norm": 0.0}
        more = {
            "fp16": {"enabled": True},
            "max_position_embeddings": 4096,
            "my.own-key": 3,
            "optimizer": {"type": "AdamW", "params": adam, "comm": 1},
        }
        path = write_yaml("a.yml", **PILE | more)
        out = command("convert", f"source={path}", "gpus=8", "out=mine").out
        rows = dict(re.findall(r"^ ([\w.]+)  +(\S.*?) *$", out, re.MULTILINE))
        assert rows["fp16"] == "bf16-mixed, no loss scaling"
        assert rows["zero_optimization"] == rows["optimizer.comm"] == "DeepSpeed / ZeRO: not used"
        assert rows["optimizer.params.max_grad_norm"] == "DeepSpeed / ZeRO: not used"
        assert rows["rope_fusion"] == "fused kernels: no effect"
        assert rows["use_wandb"] == "logging service: use logger="
        assert rows["my.own_key"] == "unknown key"
        assert rows["max_position_embeddings"] == "learned positions: not available"
        carried = {"num_layers", "norm", "train_iters", "vocab_file", "data_path", "optimizer"}
        assert not carried & set(rows)

    def test_every_read_key_has_a_second_value(self) -> None:
        read = {item.name for cls in (NeoxConfig, NeoxTraining) for item in fields(cls)}
        inner = {f"optimizer.params.{item.name}" for item in fields(NeoxAdam)}
        inner |= {f"optimizer.{item.name}" for item in fields(NeoxOptimizer)}
        named = set(SECOND_VALUES) | {"optimizer", "optimizer.params"}
        assert read | inner <= named
        assert set(INHERITED_KEYS) == set(INHERITED_FIELDS)

    @pytest.mark.parametrize("run", ["published", "growth of an unpublished size"])
    @pytest.mark.parametrize("key", SECOND_VALUES)
    def test_no_key_is_lost(self, write_yaml: WriteYaml, key: str, run: str) -> None:
        """Check that a second value changes the recipe, is listed as inexact, or is refused."""
        grown = json.loads(OFFICIAL.read_text()) | {"pretrain_partial_init": "./source"}
        values = dict(PILE if run == "published" else grown)
        values["attention_config"] = [[["tokenformer"], "all"]]
        values = {name.replace("-", "_"): value for name, value in values.items()}
        Path("a.yml").write_text(yaml.safe_dump(values))
        before = neox_recipe(Path("a.yml"), 8)
        section = values
        *parents, last = key.split(".")
        for parent in parents:
            section[parent] = dict(section[parent])
            section = section[parent]
        assert section.get(last) != SECOND_VALUES[key]
        section[last] = SECOND_VALUES[key]
        Path("a.yml").write_text(yaml.safe_dump(values))
        try:
            after = neox_recipe(Path("a.yml"), 8)
        except UserError as error:
            assert key in str(error)
            return
        assert after.text != before.text or key in after.inexact

    @pytest.mark.parametrize(
        ("changes", "key"),
        [
            ({"init_method": "small_init"}, "init_method"),
            ({"checkpoint_scale": "log"}, "checkpoint_factor"),
            ({"tokenizer-type": "GPT2BPETokenizer"}, "vocab_file"),
            ({"lr_decay_style": "constant"}, "lr_decay_style"),
            ({"pretrain_partial_init": "./small"}, "rotary_pct"),
            ({"pretrain_partial_init": "./small"}, "init_method"),
        ],
    )
    def test_value_without_equivalent_is_listed(
        self, write_yaml: WriteYaml, changes: dict[str, Any], key: str
    ) -> None:
        assert key not in neox_recipe(write_yaml("a.yml", **PILE), 8).inexact
        assert key in neox_recipe(write_yaml("a.yml", **PILE | changes), 8).inexact

    def test_growth_lists_given_inherited_keys(self, write_yaml: WriteYaml) -> None:
        given = {
            "rotary_pct": 0.25,
            "rotary_emb_base": 10000,
            "layernorm_epsilon": 1e-5,
            "init_method": "normal",
            "init_method_std": 0.02,
            "output_layer_init_method": "wang_init",
        }
        path = write_yaml("a.yml", **given, pretrain_partial_init="./small")
        inexact = neox_recipe(path, 2).inexact
        kept = "a growth keeps the value of the source"
        assert {key for key, reason in inexact.items() if reason == kept} == set(given)
        path = write_yaml("a.yml", rotary_pct=None, pretrain_partial_init="./small")
        assert "rotary_pct" not in neox_recipe(path, 2).inexact

    @pytest.mark.parametrize(
        ("changes", "key", "value"),
        [
            ({"lr_decay_style": "constant"}, "optim.schedule", "constant"),
            ({"lr_decay_iters": 1000}, "optim.decay_steps", 1000),
            ({"lr_decay_iters": 1000}, "optim.warmup_steps", 10.0),
            ({"warmup": 0.0005}, "optim.warmup_steps", 71.5),
            ({"min_lr": "3e-5"}, "optim.min_lr", 3e-5),
            ({"train_batch_size": 16}, "batch_size", 16),
            ({"seed": 7}, "seed", 7),
            ({"split": "90,10,0"}, "data.split", "90,10,0"),
            ({"eval_iters": None}, "validation_sequences", 1600),
            ({"eval_interval": None}, "validation_every", 1000),
            ({"log_interval": None}, "log_every", 100),
            ({"init_method": "small_init"}, "model.init", "balanced"),
            ({"tokenizer-type": "HFTokenizer"}, "model.vocab_size", 50304),
            ({"keep_last_n_checkpoints": None}, "keep_checkpoints", 1_000_000),
            (
                {"train_batch_size": 96, "train_micro_batch_size_per_gpu": None},
                *("micro_batch_size", 12),
            ),
            (
                {
                    "train_batch_size": 96,
                    "train_micro_batch_size_per_gpu": None,
                    "gradient_accumulation_steps": 4,
                },
                *("micro_batch_size", 3),
            ),
        ],
    )
    def test_key_is_converted_or_has_the_neox_default(
        self, write_yaml: WriteYaml, changes: dict[str, Any], key: str, value: Any
    ) -> None:
        there = yaml.safe_load(neox_recipe(write_yaml("a.yml", **changes), 8).text)
        for part in key.split("."):
            there = there[part]
        assert there == value

    def test_without_a_number_all_checkpoints_are_kept(
        self, convert_yaml: Command, write_yaml: WriteYaml, compose_converted: Composed
    ) -> None:
        convert_yaml(
            f"source={write_yaml('a.yml', **PILE | {'keep_last_n_checkpoints': None})}", "gpus=8"
        )
        assert (
            "  # all: the YAML has no keep_last_n_checkpoints\n"
            in Path("mine/recipes/a.yaml").read_text()
        )
        assert resolve_train(compose_converted("recipes=a")).keep_checkpoints == 1_000_000

    def test_without_gpus_the_micro_batch_size_is_missing(self, write_yaml: WriteYaml) -> None:
        given = {"train_batch_size": 96, "train_micro_batch_size_per_gpu": None}
        recipe = neox_recipe(write_yaml("a.yml", **PILE | given), None)
        assert recipe.missing == ["micro_batch_size"]
        assert "# train_batch_size / GPUs / gradient_accumulation_steps" in recipe.text


class TestVocabulary:
    def test_missing_tokenizer_is_assumed_to_be_gpt_neox(
        self, convert_yaml: Command, write_yaml: WriteYaml
    ) -> None:
        output = convert_yaml(f"source={write_yaml('a.yml', **PILE)}", "gpus=8")
        reason = (
            "assumed: 50277 entries of the GPT-NeoX tokenizer, padded to a multiple of 128; "
            "./tokenizer.json does not exist"
        )
        assert f"vocabulary 50304, {reason}; set tokenizer.file=FILE to count it" in output
        text = Path("mine/recipes/a.yaml").read_text()
        assert "override /model: 150m" in text
        assert re.search(rf"\nmodel:\n  vocab_size: 50304 +# {re.escape(reason)}\n", text)
        bare = neox_recipe(write_yaml("a.yml", **PILE | {"vocab-file": None}), 8)
        assert "padded to a multiple of 128; the YAML has no vocab_file" in bare.text

    def test_tokenizer_sets_the_rows_of_the_model(
        self,
        convert_yaml: Command,
        write_yaml: WriteYaml,
        compose_converted: Composed,
        store: TokenStore,
    ) -> None:
        file = store.folder / "tokenizer.json"
        path = write_yaml("a.yml", **PILE | {"vocab-file": str(file)})
        assert "assumed" not in convert_yaml(f"source={path}", "gpus=8")
        text = Path("mine/recipes/a.yaml").read_text()
        assert "override /model: 150m" in text and f"# 512 entries of {file}, padded" in text
        (stage,) = resolve_train(compose_converted("recipes=a")).stages
        assert (stage.model.vocab_size, stage.model.width) == (512, 768)

    @pytest.mark.parametrize(
        ("entries", "multiple", "rows"),
        [(129, None, 256), (128, 128, 128), (128, 1000, 1000), (130, 1, 130)],
    )
    def test_vocabulary_is_padded_like_gpt_neox(
        self, write_yaml: WriteYaml, entries: int, multiple: int | None, rows: int
    ) -> None:
        file = write_tokenizer(entries, "mine.json")
        path = write_yaml("a.yml", **PILE | {"make_vocab_size_divisible_by": multiple})
        model = yaml.safe_load(neox_recipe(path, 8, tokenizer=file).text)["model"]
        assert model == {"vocab_size": rows}

    def test_vocabulary_of_the_preset_is_left_out(self, write_yaml: WriteYaml) -> None:
        write_tokenizer(50277)
        recipe = neox_recipe(write_yaml("a.yml", **PILE), 8)
        assert "model" not in yaml.safe_load(recipe.text)
        assert recipe.assumed_vocabulary is None

    def test_unpublished_size_has_its_vocabulary(self, write_yaml: WriteYaml) -> None:
        write_tokenizer(50277)
        changes = {"tokenizer-type": "HFTokenizer", "vocab_file": "tokenizer.json"}
        text = neox_recipe(write_yaml("a.yml", **changes), 8).text
        assert re.search(
            r"vocab_size: 50304 +# 50277 entries of tokenizer\.json, padded to a multiple of 128\n",
            text,
        )

    def test_given_file_of_another_tokenizer_is_counted(self, write_yaml: WriteYaml) -> None:
        recipe = neox_recipe(write_yaml("a.yml"), 8, tokenizer=write_tokenizer(300))
        assert "model.vocab_size" not in recipe.missing
        assert yaml.safe_load(recipe.text)["model"]["vocab_size"] == 384

    def test_given_end_of_text_is_in_the_recipe(
        self,
        convert_yaml: Command,
        write_yaml: WriteYaml,
        compose_converted: Composed,
        store: TokenStore,
    ) -> None:
        text = (store.folder / "tokenizer.json").read_text()
        Path("tokenizer.json").write_text(text.replace("<|endoftext|>", "<|end|>"))
        path = write_yaml("a.yml", **PILE)
        with pytest.raises(UserError, match=r"tokenizer\.end_of_text"):
            neox_recipe(path, 8)
        convert_yaml(f"source={path}", "gpus=8", "tokenizer.end_of_text='<|end|>'")
        assert compose_converted("recipes=a")["tokenizer"]["end_of_text"] == "<|end|>"

    def test_invalid_tokenizer_file_is_refused(self, write_yaml: WriteYaml) -> None:
        Path("tokenizer.json").write_text("{}")
        with pytest.raises(UserError, match=r"got \./tokenizer\.json, which cannot be read"):
            neox_recipe(write_yaml("a.yml", **PILE), 8)
