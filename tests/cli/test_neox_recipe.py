"""`tokengrow convert` of a GPT-NeoX YAML into a recipe of the same run, and its refusals."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from published_yaml import gpus_of, published

from tokengrow.checkpoint.store import Checkpoint, save_checkpoint
from tokengrow.cli.neox_recipe import neox_recipe
from tokengrow.errors import UserError
from tokengrow.model.config import ModelConfig
from tokengrow.training.recipe import resolve_train

Command = Callable[..., Any]
Composed = Callable[..., dict[str, Any]]
WriteYaml = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("somewhere")

PILE = published("150M_train_pile")
"""Published config of the 150M model."""

SHIPPED = {
    "150M_train_pile": "tokenformer-150m-pile",
    "450M_train_pile": "tokenformer-450m-pile",
    "900M_train_pile": "tokenformer-900m-pile",
    "1-5B_train_pile": "tokenformer-1.5b-pile",
    "354M_train_openwebtext2_basemodel": "owt2-354m",
    "354M_to_757M_train_openwebtext2_60k": "owt2-354m-to-757m-60k",
    "354M_to_757M_train_openwebtext2_120k": "owt2-354m-to-757m-120k",
}
"""Published config to the recipe of the same run."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Source of the published growths: a checkpoint that has only its size."""
    folder = tmp_path_factory.mktemp("small") / "owt2-354m"
    return save_checkpoint(folder, Checkpoint(ModelConfig.preset("owt2-354m"), weights={}))


class TestRun:
    @pytest.mark.parametrize("name", SHIPPED)
    def test_published_config_is_the_shipped_recipe(
        self,
        convert_yaml: Command,
        write_yaml: WriteYaml,
        composed: Composed,
        compose_converted: Composed,
        small: Path,
        name: str,
    ) -> None:
        path = write_yaml(f"{name}.yml", **published(name))
        convert_yaml(f"source={path}", f"gpus={gpus_of(name)}")
        places = ["data.prefix=p", "tokenizer.file=t", "out=o", "name=n"]
        if "_to_" in name:
            places.append(f"source={small}")
        recipe = neox_recipe(path, gpus_of(name)).name
        converted = compose_converted(f"recipes={recipe}", *places)
        shipped = composed("train", f"recipes={SHIPPED[name]}", *places)
        assert resolve_train(converted) == resolve_train(shipped)

    def test_recipe_has_the_paths_of_the_yaml(
        self, convert_yaml: Command, write_yaml: WriteYaml, compose_converted: Composed
    ) -> None:
        convert_yaml(f"source={write_yaml('a.yml', **PILE)}", "gpus=8")
        values = compose_converted("recipes=a")
        assert values["data"]["prefix"] == "./data/pile/pile_0.87_deduped_text_document"
        assert values["data"]["split"] == "969, 30, 1"
        assert values["tokenizer"]["file"] == "./tokenizer.json"
        assert values["name"] == "a"

    def test_path_is_not_interpolated(
        self, convert_yaml: Command, write_yaml: WriteYaml, compose_converted: Composed
    ) -> None:
        path = write_yaml("a.yml", **PILE | {"data_path": "${oc.env:HOME}/a: b"})
        convert_yaml(f"source={path}", "gpus=8")
        assert compose_converted("recipes=a")["data"]["prefix"] == "${oc.env:HOME}/a: b"

    def test_given_tokenizer_replaces_that_of_the_yaml(
        self, convert_yaml: Command, write_yaml: WriteYaml, compose_converted: Composed
    ) -> None:
        convert_yaml(f"source={write_yaml('a.yml', **PILE)}", "gpus=8", "tokenizer.file=mine.json")
        assert compose_converted("recipes=a")["tokenizer"]["file"] == "mine.json"

    def test_printed_command_runs(
        self, convert_yaml: Command, write_yaml: WriteYaml, command: Command
    ) -> None:
        output = convert_yaml(f"source='{write_yaml('150M Train.yml', **PILE)}'", "gpus=8")
        printed = re.search(r"tokengrow train (--config-dir mine recipes=150m-train)$", output)
        assert printed
        planned = command("plan", *printed[1].split())
        assert planned.status == 0, planned.err
        assert "151,881,216" in planned.out

    @pytest.mark.parametrize("key", ["source", "config"])
    def test_json_is_read_too(self, command: Command, write_yaml: WriteYaml, key: str) -> None:
        write_yaml("a.yml", **PILE)
        Path("b.json").write_text(json.dumps(PILE, indent=1))
        assert command("convert", f"{key}=b.json", "gpus=8", "out=mine").status == 0
        text = Path("mine/recipes/b.yaml").read_text()
        assert text == neox_recipe(Path("a.yml"), 8).text.replace("a.yml", "b.json").replace(
            "name: a\n", "name: b\n"
        )

    def test_config_without_source_gives_the_same_recipe(
        self, convert_yaml: Command, write_yaml: WriteYaml, command: Command
    ) -> None:
        path = write_yaml("a.yml", **PILE)
        convert_yaml(f"source={path}")
        assert command("convert", f"config={path}", "out=two", "to=tokengrow").status == 0
        assert Path("two/recipes/a.yaml").read_text() == Path("mine/recipes/a.yaml").read_text()

    def test_without_gpus_the_batch_size_is_missing(
        self, convert_yaml: Command, write_yaml: WriteYaml, command: Command
    ) -> None:
        output = convert_yaml(f"source={write_yaml('a.yml', **PILE)}")
        assert "recipes=a batch_size=..." in output and "eval_iters" in output
        text = Path("mine/recipes/a.yaml").read_text()
        assert "# 32 x 4 = 128 per GPU" in text and "validation_sequences" not in text
        train = ("--config-dir", "mine", "recipes=a")
        assert command("plan", *train).err.startswith("tokengrow plan: batch_size is missing")
        assert command("plan", *train, "batch_size=1024").status == 0

    def test_unpublished_size_has_all_values(
        self,
        convert_yaml: Command,
        write_yaml: WriteYaml,
        compose_converted: Composed,
        published_config: ModelConfig,
    ) -> None:
        output = convert_yaml(f"source={write_yaml('a.yml')}", "gpus=2")
        assert "model.vocab_size=... data.prefix=... tokenizer.file=..." in output
        values = compose_converted("recipes=a", "model.vocab_size=512")
        assert resolve_train(values).stages[0].model == published_config

    def test_growth_requires_a_source(
        self, convert_yaml: Command, write_yaml: WriteYaml, command: Command
    ) -> None:
        path = write_yaml("a.yml", **PILE, pretrain_partial_init="./small/checkpoints")
        assert "source=..." in convert_yaml(f"source={path}", "gpus=8")
        head = Path("mine/recipes/a.yaml").read_text()
        assert "# It grows the model of ./small/checkpoints" in head
        assert "# tokengrow convert source=FILE" in head
        error = command("plan", "--config-dir", "mine", "recipes=a").err
        assert error.startswith("tokengrow plan: source is missing")

    def test_growth_leaves_out_inherited_fields(self, write_yaml: WriteYaml) -> None:
        path = write_yaml("a.yml", pretrain_partial_init="./small/checkpoints")
        model = yaml.safe_load(neox_recipe(path, 2).text)["model"]
        assert set(model) == {
            *("vocab_size", "context_length", "layers", "width", "heads", "tokens", "activation")
        }

    @pytest.mark.parametrize(
        ("name", "recipe"),
        [("1-5B_Train.yml", "1-5b-train"), ("_a b!.v2.yaml", "a-b-.v2"), ("__.yml", "neox")],
    )
    def test_recipe_name_has_no_special_characters(
        self, write_yaml: WriteYaml, name: str, recipe: str
    ) -> None:
        assert neox_recipe(write_yaml(name), 1).name == recipe


class TestRefusal:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"lr_decay_style": "linear"},
                "lr_decay_style must be cosine or constant, got 'linear'",
            ),
            ({"lr_decay_style": None}, "lr_decay_style must be cosine or constant, got 'linear'"),
            (
                {"optimizer": {"type": "Lion", "params": {"lr": 1}}},
                "optimizer.type must be Adam or AdamW, got 'Lion'",
            ),
            ({"optimizer": {"type": "Adam", "params": {}}}, "optimizer.params.lr is missing"),
            ({"optimizer": None}, "optimizer is missing"),
            (
                {"train_data_paths": ["a", "b"]},
                "train_data_paths must be null. Give one data_path instead.",
            ),
            ({"data_path": ["a", "b"]}, "data_path"),
            ({"data_impl": "cached"}, "data_impl must be infer or mmap, got 'cached'"),
            (
                {"train_batch_size": 100},
                "train_batch_size must be 16, 2 x 1 on each of gpus=8, got 100",
            ),
            ({"train_batch_size": 9, "train_micro_batch_size_per_gpu": None}, "of gpus=8 x"),
            ({"train_iters": None}, "train_iters is missing"),
            (
                {"split": "most, some"},
                "split must be the shares of train, validation and test, for example "
                "'969, 30, 1', got 'most, some'",
            ),
            ({"gradient_clipping": 0}, "gradient_clipping must be positive"),
            ({"eval_iters": 0}, "eval_iters must be at least 1, got 0"),
            ({"norm": "rmsnorm"}, "norm must be"),
        ],
    )
    def test_unsupported_value_is_refused_by_key(
        self, write_yaml: WriteYaml, changes: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(UserError) as error:
            neox_recipe(write_yaml("a.yml", **changes), 8)
        assert str(error.value).startswith("a.yml: ") and message in str(error.value)

    def test_refusal_writes_nothing(self, write_yaml: WriteYaml, command: Command) -> None:
        path = write_yaml("a.yml", lr_decay_style="linear")
        outcome = command("convert", f"source={path}", "out=deep/mine")
        assert (outcome.status, outcome.out) == (2, "")
        assert outcome.err.startswith(
            "tokengrow convert: a.yml: lr_decay_style must be cosine or constant, got 'linear'"
        )
        assert [path.name for path in Path().iterdir()] == ["a.yml"]

    def test_existing_out_is_not_changed(self, write_yaml: WriteYaml, command: Command) -> None:
        Path("mine").mkdir()
        Path("mine/note.txt").write_text("mine")
        outcome = command("convert", f"source={write_yaml('a.yml')}", "out=mine")
        assert outcome.status == 2
        assert "out=mine exists. Choose another out=" in outcome.err
        assert [path.name for path in Path("mine").iterdir()] == ["note.txt"]
