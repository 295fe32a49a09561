"""Hugging Face format: the folder, its tokenizer, and reading it back."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tokenizers
import torch
from exported import (
    MODEL_FILES,
    checkpoint_with_tokenizer,
    equal_weights,
    export,
    random_checkpoint,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import models, pre_tokenizers, processors
from torch import nn

from tokengrow.data.tokenizer import Tokenizer
from tokengrow.errors import UserError
from tokengrow.interop.hf import is_hf, read_hf, write_hf

Load = Callable[..., nn.Module]


class TestFolder:
    def test_folder_of_a_model_without_a_tokenizer(self, folder: Path) -> None:
        assert {path.name for path in folder.iterdir()} == MODEL_FILES
        config = json.loads((folder / "config.json").read_text())
        assert (config["model_type"], config["dtype"]) == ("tokenformer", "float32")
        assert (config["hidden_size"], config["num_attention_heads"]) == (24, 3)
        assert (config["num_hidden_layers"], config["max_position_embeddings"]) == (2, 32)
        assert config["tau"] == {"query": 2.0, "key": 3.0, "value": 2.5, "output": 1.7, "ffn": 4.0}
        assert config["eos_token_id"] is config["bos_token_id"] is config["pad_token_id"] is None

    def test_tokenizer_adds_its_files_and_ids(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        folder = export(tmp_path / "hf", checkpoint_with_tokenizer(tokenizer))
        files = {path.name for path in folder.iterdir()}
        assert files == MODEL_FILES | {"tokenizer.json", "tokenizer_config.json"}
        for name in ("config.json", "generation_config.json"):
            values = json.loads((folder / name).read_text())
            assert {values[f"{token}_token_id"] for token in ("bos", "eos", "pad")} == {0}

    def test_json_is_sorted_and_ends_in_a_newline(
        self, tmp_path: Path, tokenizer: Tokenizer
    ) -> None:
        folder = export(tmp_path / "hf", checkpoint_with_tokenizer(tokenizer))
        for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
            text = (folder / name).read_text()
            assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"

    def test_weights_keep_their_dtype(self, tmp_path: Path) -> None:
        source = random_checkpoint(torch.bfloat16)
        path = export(tmp_path / "hf", source) / "model.safetensors"
        weights = {f"model.{name}": tensor for name, tensor in source.weights.items()}
        assert equal_weights(load_file(path), weights)
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}

    def test_mixed_dtypes_are_loaded_without_rounding(self, load: Load, tmp_path: Path) -> None:
        source = random_checkpoint()
        half = source.weights["embedding.weight"].half()
        mixed = replace(source, weights={**source.weights, "embedding.weight": half})
        state = load(export(tmp_path / "hf", mixed)).state_dict()
        assert state["model.embedding.weight"].dtype == torch.float32
        for name, tensor in mixed.weights.items():
            assert torch.equal(state[f"model.{name}"], tensor.float()), name

    @pytest.mark.parametrize(
        ("changes", "message"),
        [({"tokenizer": "{}"}, "is not a tokenizers JSON"), ({"end_of_text": "<eod>"}, "<eod>")],
    )
    def test_invalid_tokenizer_is_an_error(
        self, tmp_path: Path, tokenizer: Tokenizer, changes: dict[str, str], message: str
    ) -> None:
        with pytest.raises(UserError, match=message):
            write_hf(tmp_path, replace(checkpoint_with_tokenizer(tokenizer), **changes))


class TestReading:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_read_returns_what_was_written(
        self, tmp_path: Path, tokenizer: Tokenizer, dtype: torch.dtype
    ) -> None:
        weights = random_checkpoint(dtype).weights
        source = replace(checkpoint_with_tokenizer(tokenizer), weights=weights)
        actual = read_hf(export(tmp_path / "hf", source))
        assert actual.config == source.config
        assert equal_weights(actual.weights, source.weights)
        assert (actual.tokenizer, actual.end_of_text) == (source.tokenizer, source.end_of_text)

    @pytest.mark.parametrize("max_shard_size", ["1GB", "10KB"])
    def test_folder_saved_by_transformers_is_read(
        self, hub: ModuleType, load: Load, tmp_path: Path, tokenizer: Tokenizer, max_shard_size: str
    ) -> None:
        source, saved = checkpoint_with_tokenizer(tokenizer), tmp_path / "saved"
        folder = export(tmp_path / "hf", source)
        load(folder).save_pretrained(saved, max_shard_size=max_shard_size)
        hub.AutoTokenizer.from_pretrained(folder, trust_remote_code=True).save_pretrained(saved)
        assert len(list(saved.glob("*.safetensors"))) == {"1GB": 1, "10KB": 5}[max_shard_size]
        actual = read_hf(saved)
        assert actual.config == source.config
        assert equal_weights(actual.weights, source.weights)
        assert actual.tokenizer is not None and actual.end_of_text == source.end_of_text
        text = "def add(a, b):\n    return a + b"
        assert Tokenizer.from_json(actual.tokenizer).encode(text) == tokenizer.encode(text)

    def test_error_names_every_wrong_tensor(self, folder: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(folder, tmp_path / "hf"))
        weights = load_file(copy / "model.safetensors")
        del weights["model.final_norm.bias"]
        weights["model.final_norm.weight"] = torch.zeros(23)
        save_file(weights | {"lm_head.weight": torch.zeros(2)}, copy / "model.safetensors")
        with pytest.raises(UserError) as error:
            read_hf(copy)
        assert (
            "model.final_norm.weight must have shape [24], got [23]; "
            "model.final_norm.bias [24] is missing; "
            "lm_head.weight [2] is not part of the model. Export"
        ) in str(error.value)

    def test_error_names_a_tensor_of_an_invalid_dtype(self, folder: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(folder, tmp_path / "hf"))
        weights = load_file(copy / "model.safetensors")
        weights["model.final_norm.bias"] = torch.zeros(24).to(torch.float8_e4m3fn)
        save_file(weights, copy / "model.safetensors")
        with pytest.raises(UserError, match=r"model\.final_norm\.bias \(float8_e4m3fn\)"):
            read_hf(copy)

    @pytest.mark.parametrize(
        ("file", "content", "message"),
        [
            ("config.json", "{", "config.json is damaged"),
            ("config.json", "[]", "config.json is damaged"),
            (
                "config.json",
                '{"model_type": "llama"}',
                "model_type must be 'tokenformer', got 'llama'",
            ),
            ("config.json", '{"model_type": "tokenformer"}', "lacks vocab_size, max_position"),
            ("model.safetensors", "{}", "model.safetensors is not a complete .safetensors"),
            ("model.safetensors", None, "model.safetensors does not exist"),
            ("tokenizer.json", "{}", "tokenizer.json is not a tokenizers JSON"),
        ],
    )
    def test_error_names_a_damaged_file(
        self, folder: Path, tmp_path: Path, file: str, content: str | None, message: str
    ) -> None:
        copy = Path(shutil.copytree(folder, tmp_path / "hf"))
        (copy / file).unlink(missing_ok=True)
        if content is not None:
            (copy / file).write_text(content)
        with pytest.raises(UserError, match=message):
            read_hf(copy)

    @pytest.mark.parametrize(
        ("index", "message"),
        [
            ({}, "no weight_map"),
            ({"weight_map": {"a": 1}}, "no weight_map"),
            ({"weight_map": {"a": "b.safetensors"}}, "b.safetensors does not exist"),
        ],
    )
    def test_error_names_a_damaged_index(
        self, folder: Path, tmp_path: Path, index: dict[str, Any], message: str
    ) -> None:
        copy = Path(shutil.copytree(folder, tmp_path / "hf"))
        (copy / "model.safetensors").unlink()
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match=message):
            read_hf(copy)

    def test_is_hf_depends_on_the_config(self, folder: Path, tmp_path: Path) -> None:
        assert is_hf(folder)
        assert not is_hf(tmp_path)
        for content in ("{", "[]", '{"model_type": "llama"}'):
            (tmp_path / "config.json").write_text(content)
            assert not is_hf(tmp_path)


class TestTokenizer:
    TEXT = "def add(a, b):\n\treturn a  +  b # Zoë ⟨x⟩ , isn 't\n"

    def test_ids_and_special_token_equal_those_of_tokengrow(
        self, hub: ModuleType, tmp_path: Path, tokenizer: Tokenizer
    ) -> None:
        folder = export(tmp_path / "hf", checkpoint_with_tokenizer(tokenizer))
        actual = hub.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        ids = tokenizer.encode(self.TEXT)
        assert actual(self.TEXT).input_ids == ids
        assert actual.decode(ids) == self.TEXT
        assert actual.bos_token_id == actual.eos_token_id == actual.pad_token_id == 0
        assert actual.model_max_length == 32

    def test_left_padding_suits_generation(
        self, hub: ModuleType, load: Load, tmp_path: Path, tokenizer: Tokenizer
    ) -> None:
        folder = export(tmp_path / "hf", checkpoint_with_tokenizer(tokenizer))
        actual = hub.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        batch = actual(["import os", "x"], return_tensors="pt", padding=True)
        assert batch.attention_mask[1].tolist()[-1] == 1
        assert load(folder).generate(**batch, max_new_tokens=3).shape[0] == 2

    def test_no_special_tokens_are_added_to_a_text(self, hub: ModuleType, tmp_path: Path) -> None:
        parsed = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2}, unk_token="<s>"))
        parsed.pre_tokenizer = pre_tokenizers.Whitespace()
        parsed.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
        texts = {"tokenizer": parsed.to_str(), "end_of_text": "<s>"}
        folder = export(tmp_path / "hf", replace(random_checkpoint(), **texts))
        actual = hub.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert actual("a b").input_ids == [1, 2]

    def test_space_before_the_first_word_is_kept(
        self, hub: ModuleType, tmp_path: Path, tokenizer: Tokenizer
    ) -> None:
        parsed = tokenizers.Tokenizer.from_str(tokenizer.to_json())
        parsed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        spaced = Tokenizer(parsed)
        folder = export(tmp_path / "hf", checkpoint_with_tokenizer(spaced))
        # transformers 4 reads this file, transformers 5 reads tokenizer.json.
        assert json.loads((folder / "tokenizer_config.json").read_text())["add_prefix_space"]
        actual = hub.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert actual("import os").input_ids == spaced.encode("import os")
        assert spaced.encode("import os") != tokenizer.encode("import os")
