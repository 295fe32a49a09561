"""`tokengrow convert` of a GPT-NeoX YAML, key by key: carried over, listed or refused."""

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
Written = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("somewhere")

PILE = published("150M_train_pile")
"""The published configuration of the 150M model."""

OTHERWISE: dict[str, Any] = {
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
"""Another value, which GPT-NeoX allows, of every key that is read, and of some that are not."""


def tokenizer_of(entries: int, path: str = "tokenizer.json") -> str:
    """Writes a tokenizer with so many entries, one of them an added token; gives its path."""
    made = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(entries - 1)}, "w0"))
    made.add_special_tokens(["<|endoftext|>"])
    made.save(path)
    return path


class TestKeys:
    def test_every_key_that_is_left_behind_is_listed_with_a_reason(
        self, command: Command, written: Written
    ) -> None:
        adam = {"lr": "6e-4", "max_grad_norm": 0.0}
        more = {
            "fp16": {"enabled": True},
            "max_position_embeddings": 4096,
            "my.own-key": 3,
            "optimizer": {"type": "AdamW", "params": adam, "comm": 1},
        }
        path = written("a.yml", **PILE | more)
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

    def test_every_key_that_is_read_has_another_value_here(self) -> None:
        read = {item.name for cls in (NeoxConfig, NeoxTraining) for item in fields(cls)}
        inner = {f"optimizer.params.{item.name}" for item in fields(NeoxAdam)}
        inner |= {f"optimizer.{item.name}" for item in fields(NeoxOptimizer)}
        named = set(OTHERWISE) | {"optimizer", "optimizer.params"}
        assert read | inner <= named
        assert set(INHERITED_KEYS) == set(INHERITED_FIELDS)

    @pytest.mark.parametrize("run", ["published", "growth of a size of one's own"])
    @pytest.mark.parametrize("key", OTHERWISE)
    def test_no_key_is_lost(self, written: Written, key: str, run: str) -> None:
        """Another value gives another recipe, or is among what is left, or is refused."""
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
        assert section.get(last) != OTHERWISE[key]
        section[last] = OTHERWISE[key]
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
    def test_a_key_with_a_value_that_cannot_be_carried_is_listed(
        self, written: Written, changes: dict[str, Any], key: str
    ) -> None:
        assert key not in neox_recipe(written("a.yml", **PILE), 8).inexact
        assert key in neox_recipe(written("a.yml", **PILE | changes), 8).inexact

    def test_a_growth_lists_what_it_keeps_and_the_yaml_gives(self, written: Written) -> None:
        given = {
            "rotary_pct": 0.25,
            "rotary_emb_base": 10000,
            "layernorm_epsilon": 1e-5,
            "init_method": "normal",
            "init_method_std": 0.02,
            "output_layer_init_method": "wang_init",
        }
        path = written("a.yml", **given, pretrain_partial_init="./small")
        inexact = neox_recipe(path, 2).inexact
        kept = "a growth keeps the value of the source"
        assert {key for key, why in inexact.items() if why == kept} == set(given)
        path = written("a.yml", rotary_pct=None, pretrain_partial_init="./small")
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
    def test_a_key_is_carried_over_or_has_the_default_of_gpt_neox(
        self, written: Written, changes: dict[str, Any], key: str, value: Any
    ) -> None:
        there = yaml.safe_load(neox_recipe(written("a.yml", **changes), 8).text)
        for part in key.split("."):
            there = there[part]
        assert there == value

    def test_all_checkpoints_are_kept_where_the_yaml_names_no_number(
        self, convert_yaml: Command, written: Written, from_mine: Composed
    ) -> None:
        convert_yaml(
            f"source={written('a.yml', **PILE | {'keep_last_n_checkpoints': None})}", "gpus=8"
        )
        assert (
            "  # all: the YAML has no keep_last_n_checkpoints\n"
            in Path("mine/recipes/a.yaml").read_text()
        )
        assert resolve_train(from_mine("recipes=a")).keep_checkpoints == 1_000_000

    def test_without_the_gpus_a_share_of_the_batch_is_the_users_to_give(
        self, written: Written
    ) -> None:
        given = {"train_batch_size": 96, "train_micro_batch_size_per_gpu": None}
        recipe = neox_recipe(written("a.yml", **PILE | given), None)
        assert recipe.missing == ["micro_batch_size"]
        assert "# train_batch_size / GPUs / gradient_accumulation_steps" in recipe.text


class TestVocabulary:
    def test_a_tokenizer_that_is_not_there_is_taken_for_that_of_gpt_neox_and_it_says_so(
        self, convert_yaml: Command, written: Written
    ) -> None:
        said = convert_yaml(f"source={written('a.yml', **PILE)}", "gpus=8")
        why = (
            "assumed: 50277 entries of the GPT-NeoX tokenizer, padded to a multiple of 128; "
            "./tokenizer.json does not exist"
        )
        assert f"vocabulary 50304, {why}; set tokenizer.file=FILE to count it" in said
        text = Path("mine/recipes/a.yaml").read_text()
        assert "override /model: 150m" in text
        assert re.search(rf"\nmodel:\n  vocab_size: 50304 +# {re.escape(why)}\n", text)
        bare = neox_recipe(written("a.yml", **PILE | {"vocab-file": None}), 8)
        assert "padded to a multiple of 128; the YAML has no vocab_file" in bare.text

    def test_a_tokenizer_of_another_size_gives_the_model_its_rows(
        self, convert_yaml: Command, written: Written, from_mine: Composed, store: TokenStore
    ) -> None:
        file = store.folder / "tokenizer.json"
        path = written("a.yml", **PILE | {"vocab-file": str(file)})
        assert "assumed" not in convert_yaml(f"source={path}", "gpus=8")
        text = Path("mine/recipes/a.yaml").read_text()
        assert "override /model: 150m" in text and f"# 512 entries of {file}, padded" in text
        (stage,) = resolve_train(from_mine("recipes=a")).stages
        assert (stage.model.vocab_size, stage.model.width) == (512, 768)

    @pytest.mark.parametrize(
        ("entries", "multiple", "rows"),
        [(129, None, 256), (128, 128, 128), (128, 1000, 1000), (130, 1, 130)],
    )
    def test_it_is_padded_as_gpt_neox_does(
        self, written: Written, entries: int, multiple: int | None, rows: int
    ) -> None:
        file = tokenizer_of(entries, "mine.json")
        path = written("a.yml", **PILE | {"make_vocab_size_divisible_by": multiple})
        model = yaml.safe_load(neox_recipe(path, 8, tokenizer=file).text)["model"]
        assert model == {"vocab_size": rows}

    def test_the_size_of_the_preset_needs_no_word(self, written: Written) -> None:
        tokenizer_of(50277)
        recipe = neox_recipe(written("a.yml", **PILE), 8)
        assert "model" not in yaml.safe_load(recipe.text)
        assert recipe.assumed_vocabulary is None

    def test_a_size_of_ones_own_says_it(self, written: Written) -> None:
        tokenizer_of(50277)
        changes = {"tokenizer-type": "HFTokenizer", "vocab_file": "tokenizer.json"}
        text = neox_recipe(written("a.yml", **changes), 8).text
        assert re.search(
            r"vocab_size: 50304 +# 50277 entries of tokenizer\.json, padded to a multiple of 128\n",
            text,
        )

    def test_a_file_in_place_of_another_kind_of_tokenizer_is_counted(
        self, written: Written
    ) -> None:
        recipe = neox_recipe(written("a.yml"), 8, tokenizer=tokenizer_of(300))
        assert "model.vocab_size" not in recipe.missing
        assert yaml.safe_load(recipe.text)["model"]["vocab_size"] == 384

    def test_another_end_of_text_goes_into_the_recipe(
        self, convert_yaml: Command, written: Written, from_mine: Composed, store: TokenStore
    ) -> None:
        text = (store.folder / "tokenizer.json").read_text()
        Path("tokenizer.json").write_text(text.replace("<|endoftext|>", "<|end|>"))
        path = written("a.yml", **PILE)
        with pytest.raises(UserError, match=r"tokenizer\.end_of_text"):
            neox_recipe(path, 8)
        convert_yaml(f"source={path}", "gpus=8", "tokenizer.end_of_text='<|end|>'")
        assert from_mine("recipes=a")["tokenizer"]["end_of_text"] == "<|end|>"

    def test_a_file_that_is_no_tokenizer_is_refused(self, written: Written) -> None:
        Path("tokenizer.json").write_text("{}")
        with pytest.raises(UserError, match=r"got \./tokenizer\.json, which cannot be read"):
            neox_recipe(written("a.yml", **PILE), 8)
