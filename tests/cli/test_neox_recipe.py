"""`tokengrow convert` of a GPT-NeoX YAML: the same run as a recipe, and what is left behind."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tokengrow.cli.neox_recipe import neox_recipe
from tokengrow.cli.resolve import resolve_train
from tokengrow.errors import UserError
from tokengrow.model.config import ModelConfig

Command = Callable[..., Any]
Composed = Callable[..., dict[str, Any]]
Written = Callable[..., Path]

OFFICIAL = Path(__file__).parents[1] / "golden" / "A_tiny_init" / "config.json"
"""The configuration of model A in the published code; JSON is YAML."""

PILE = {
    "num_layers": 12,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "qkv_slot_num": 768,
    "proj_slot_num": 768,
    "ffn_slot_num": 3072,
    "seq_length": 2048,
    "max_position_embeddings": 2048,
    "attention_config": [[["tokenformer"], 12]],
    "train_micro_batch_size_per_gpu": 32,
    "gradient_accumulation_steps": 4,
    "checkpoint_factor": 500,
    "keep_last_n_checkpoints": 6,
    "tokenizer-type": "HFTokenizer",
    "vocab-file": "./tokenizer.json",
    "data_path": "./data/pile_text_document",
}
"""What the published configuration of the 150M model changes in that of model A."""


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder to stand in; every path below is relative to it."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def written() -> Written:
    """`written(name, **changes)`: the official configuration with these keys changed; None takes
    one out."""

    def write(name: str, **changes: Any) -> Path:
        values = json.loads(OFFICIAL.read_text()) | changes
        Path(name).write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
        return Path(name)

    return write


@pytest.fixture
def convert(command: Command) -> Callable[..., str]:
    """`convert(*arguments)`: into the folder `mine`; gives what it said, on one line."""

    def call(*arguments: str) -> str:
        outcome = command("convert", *arguments, "out=mine")
        assert (outcome.status, outcome.err) == (0, "")
        return " ".join(outcome.out.split())

    return call


@pytest.fixture
def from_mine(composed: Composed) -> Composed:
    """`from_mine(*overrides)`: the run that a recipe in the folder `mine` composes to."""
    return lambda *words: composed(
        "train", f"hydra.searchpath=[file://{Path('mine').resolve()}]", *words
    )


class TestRun:
    def test_the_published_150m_is_the_shipped_recipe(
        self, convert: Command, written: Written, composed: Composed, from_mine: Composed
    ) -> None:
        convert(f"source={written('150M_train_pile.yml', **PILE)}", "gpus=8")
        places = ["data.prefix=p", "tokenizer.file=t", "out=o", "name=n"]
        found = from_mine("recipes=150m-train-pile", *places)
        shipped = composed("train", "recipes=tokenformer-150m-pile", *places)
        assert resolve_train(found).run == resolve_train(shipped).run

    def test_it_names_the_paths_of_the_yaml(
        self, convert: Command, written: Written, from_mine: Composed
    ) -> None:
        convert(f"source={written('a.yml', **PILE)}", "gpus=8")
        values = from_mine("recipes=a")
        assert values["data"]["prefix"] == "./data/pile_text_document"
        assert values["data"]["split"] == "969, 30, 1"
        assert values["tokenizer"]["file"] == "./tokenizer.json"
        assert values["name"] == "a"

    def test_a_path_is_taken_to_the_letter(
        self, convert: Command, written: Written, from_mine: Composed
    ) -> None:
        path = written("a.yml", **PILE | {"data_path": "${oc.env:HOME}/a: b"})
        convert(f"source={path}", "gpus=8")
        assert from_mine("recipes=a")["data"]["prefix"] == "${oc.env:HOME}/a: b"

    def test_a_tokenizer_of_ones_own_takes_the_place_of_the_yamls(
        self, convert: Command, written: Written, from_mine: Composed
    ) -> None:
        convert(f"source={written('a.yml', **PILE)}", "gpus=8", "tokenizer.file=mine.json")
        assert from_mine("recipes=a")["tokenizer"]["file"] == "mine.json"

    def test_the_command_that_it_prints_runs(
        self, convert: Command, written: Written, command: Command
    ) -> None:
        said = convert(f"source='{written('150M Train.yml', **PILE)}'", "gpus=8")
        printed = re.search(r"tokengrow train (--config-dir mine recipes=150m-train)$", said)
        assert printed
        planned = command("plan", *printed[1].split())
        assert planned.status == 0, planned.err
        assert "151,881,216" in planned.out

    def test_config_without_a_source_is_the_same(
        self, convert: Command, written: Written, command: Command
    ) -> None:
        path = written("a.yml", **PILE)
        convert(f"source={path}")
        assert command("convert", f"config={path}", "out=two", "to=tokengrow").status == 0
        assert Path("two/recipes/a.yaml").read_text() == Path("mine/recipes/a.yaml").read_text()

    def test_without_the_gpus_the_batch_size_is_the_users_to_give(
        self, convert: Command, written: Written, command: Command
    ) -> None:
        said = convert(f"source={written('a.yml', **PILE)}")
        assert "recipes=a batch_size=..." in said and "eval_iters" in said
        text = Path("mine/recipes/a.yaml").read_text()
        assert "# 32 x 4 = 128 per GPU" in text and "validation_sequences" not in text
        train = ("--config-dir", "mine", "recipes=a")
        assert command("plan", *train).err.startswith("tokengrow plan: batch_size is missing")
        assert command("plan", *train, "batch_size=1024").status == 0

    def test_a_size_of_ones_own_is_spelled_out(
        self, convert: Command, written: Written, from_mine: Composed, published_config: ModelConfig
    ) -> None:
        said = convert(f"source={written('a.yml')}", "gpus=2")
        assert "model.vocab_size=... data.prefix=... tokenizer.file=..." in said
        values = from_mine("recipes=a", "model.vocab_size=512")
        assert resolve_train(values).run.stages[0].model == published_config

    def test_a_growth_asks_for_its_source(
        self, convert: Command, written: Written, command: Command
    ) -> None:
        path = written("a.yml", **PILE, pretrain_partial_init="./small/checkpoints")
        assert "source=..." in convert(f"source={path}", "gpus=8")
        head = Path("mine/recipes/a.yaml").read_text()
        assert "# It grows the model of ./small/checkpoints" in head
        assert "# tokengrow convert source=FILE" in head
        said = command("plan", "--config-dir", "mine", "recipes=a").err
        assert said.startswith("tokengrow plan: source is missing")

    def test_a_growth_of_ones_own_size_asks_for_nothing_that_growth_keeps(
        self, written: Written
    ) -> None:
        path = written("a.yml", pretrain_partial_init="./small/checkpoints")
        model = yaml.safe_load(neox_recipe(path, 2).text)["model"]
        assert set(model) == {
            *("vocab_size", "context_length", "layers", "width", "heads", "tokens", "activation")
        }

    @pytest.mark.parametrize(
        ("name", "recipe"),
        [("1-5B_Train.yml", "1-5b-train"), ("_a b!.v2.yaml", "a-b-.v2"), ("__.yml", "neox")],
    )
    def test_the_name_is_one_that_can_be_typed(
        self, written: Written, name: str, recipe: str
    ) -> None:
        assert neox_recipe(written(name), 1).name == recipe


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
        assert rows["zero_optimization"] == rows["optimizer.comm"] == "DeepSpeed / ZeRO"
        assert rows["optimizer.params.max_grad_norm"] == "DeepSpeed / ZeRO"
        assert rows["rope_fusion"] == "fused kernels: no effect"
        assert rows["use_wandb"] == "logging service: see logger="
        assert rows["my.own_key"] == "unknown to tokengrow"
        assert rows["max_position_embeddings"] == "learned positions: there are none"
        carried = {"num_layers", "norm", "train_iters", "vocab_file", "data_path", "optimizer"}
        assert not carried & set(rows)

    def test_no_key_is_lost_between_the_recipe_and_the_list(self, written: Written) -> None:
        path = written("a.yml", **PILE)
        left = set(neox_recipe(path, 8).left)
        carried = {key.replace("-", "_") for key in yaml.safe_load(path.read_text())} - left
        assert carried == {
            *("num_layers", "hidden_size", "num_attention_heads", "seq_length", "rotary_pct"),
            *("qkv_slot_num", "proj_slot_num", "ffn_slot_num", "norm_activation_type"),
            *("pipe_parallel_size", "model_parallel_size", "pos_emb", "norm", "final_norm"),
            *("max_position_embeddings", "no_weight_tying", "gpt_j_residual", "attention_config"),
            *("use_bias_in_attn_linear", "hidden_dropout", "attention_dropout"),
            *("init_method", "output_layer_init_method", "optimizer", "min_lr", "warmup"),
            *("lr_decay_iters", "lr_decay_style", "weight_decay", "gradient_clipping"),
            *("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_iters"),
            *("eval_interval", "eval_iters", "log_interval", "checkpoint_factor"),
            *("keep_last_n_checkpoints", "data_impl", "data_path", "vocab_file", "tokenizer_type"),
        }

    @pytest.mark.parametrize(
        ("changes", "key"),
        [
            ({"init_method": "small_init"}, "init_method"),
            ({"checkpoint_scale": "log"}, "checkpoint_factor"),
            ({"tokenizer-type": "GPT2BPETokenizer"}, "vocab_file"),
        ],
    )
    def test_a_key_with_a_value_that_cannot_be_carried_is_listed(
        self, written: Written, changes: dict[str, Any], key: str
    ) -> None:
        assert key not in neox_recipe(written("a.yml", **PILE), 8).left
        assert key in neox_recipe(written("a.yml", **PILE | changes), 8).left

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
        ],
    )
    def test_a_key_is_carried_over_or_has_the_default_of_gpt_neox(
        self, written: Written, changes: dict[str, Any], key: str, value: Any
    ) -> None:
        there = yaml.safe_load(neox_recipe(written("a.yml", **changes), 8).text)
        for part in key.split("."):
            there = there[part]
        assert there == value


class TestRefusal:
    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"lr_decay_style": "linear"}, "lr_decay_style is 'linear'"),
            ({"lr_decay_style": None}, "lr_decay_style is 'linear'"),
            ({"optimizer": {"type": "Lion", "params": {"lr": 1}}}, "optimizer.type is 'Lion'"),
            ({"optimizer": {"type": "Adam", "params": {}}}, "optimizer.params.lr is missing"),
            ({"optimizer": None}, "optimizer is missing"),
            ({"train_data_paths": ["a", "b"]}, "train_data_paths: tokengrow takes one data_path"),
            ({"data_path": ["a", "b"]}, "data_path"),
            ({"data_impl": "cached"}, "data_impl is 'cached'"),
            ({"train_batch_size": 100}, "train_batch_size is 100, and 2 x 1 on each of gpus=8"),
            ({"train_iters": None}, "train_iters is missing"),
            ({"norm": "rmsnorm"}, "norm is"),
        ],
    )
    def test_another_run_than_tokengrow_has_is_named(
        self, written: Written, changes: dict[str, Any], said: str
    ) -> None:
        with pytest.raises(UserError) as error:
            neox_recipe(written("a.yml", **changes), 8)
        assert str(error.value).startswith("a.yml: ") and said in str(error.value)

    def test_nothing_is_written_then(self, written: Written, command: Command) -> None:
        path = written("a.yml", lr_decay_style="linear")
        outcome = command("convert", f"source={path}", "out=deep/mine")
        assert (outcome.status, outcome.out) == (2, "")
        assert outcome.err.startswith("tokengrow convert: a.yml: lr_decay_style is 'linear'")
        assert [found.name for found in Path().iterdir()] == ["a.yml"]

    def test_an_out_that_exists_is_left_alone(self, written: Written, command: Command) -> None:
        Path("mine").mkdir()
        Path("mine/note.txt").write_text("mine")
        outcome = command("convert", f"source={written('a.yml')}", "out=mine")
        assert outcome.status == 2
        assert "out=mine exists already" in outcome.err
        assert [found.name for found in Path("mine").iterdir()] == ["note.txt"]
