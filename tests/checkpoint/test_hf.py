"""The Hugging Face door: the folder, what transformers does with it, and the way back."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tokenizers
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import models, pre_tokenizers, processors
from torch import Tensor, nn

from tokengrow.checkpoint.hf import is_hf, read_hf, write_hf
from tokengrow.checkpoint.store import Checkpoint
from tokengrow.data.corpus import TextCorpus
from tokengrow.data.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from tokengrow.errors import UserError
from tokengrow.kernels.naive import ACTIVATIONS
from tokengrow.model.config import ModelConfig, Taus, Tokens
from tokengrow.model.generate import SamplingConfig, generate
from tokengrow.model.tokenformer import TokenFormer

VOCAB_SIZE = 300
MODEL_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "modeling_tokenformer.py",
}
Load = Callable[..., nn.Module]


def checkpoint(dtype: torch.dtype = torch.float32, **changes: Any) -> Checkpoint:
    """Random weights, large enough that every part of the model moves the logits."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "context_length": 32,
        "layers": 2,
        "width": 24,
        "heads": 3,
        "head_dim": 16,  # 3 * 16 is not 24
        "tokens": Tokens(query=10, key=12, value=14, output=9, ffn=30),
        "tau": Taus(query=2.0, key=3.0, value=2.5, output=1.7, ffn=4.0),
        "rotary_channels": 6,
        "norm_eps": 2e-5,
        "init": "published",
    }
    model = TokenFormer(ModelConfig(**{**sizes, **changes}))
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    for name, weight in model.named_parameters():
        weight.data *= 1 if name.startswith("final_norm") else 8
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return Checkpoint.of(model.to(dtype))


def random_ids(*shape: int) -> Tensor:
    return torch.randint(1, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(1))


def distance(found: Tensor, reference: Tensor) -> float:
    assert found.shape == reference.shape
    return (found - reference).abs().max().item()


def written(folder: Path, source: Checkpoint) -> Path:
    folder.mkdir()
    write_hf(folder, source)
    return folder


def same_weights(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(tensor, second[name])
        for name, tensor in first.items()
    )


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """transformers, offline, which copies the code of a folder where no other test sees it."""
    cache = tmp_path_factory.mktemp("hf_modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        import transformers
        from transformers import dynamic_module_utils

        # Not by its environment variable: another test may have imported transformers before.
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
        patch.setattr(sys, "path", [*sys.path])
        yield transformers


@pytest.fixture(scope="module")
def load(hub: ModuleType) -> Load:
    """`load(folder, **options)`: the causal model, in eval mode."""

    def load(folder: Path, **options: Any) -> nn.Module:
        made = hub.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)
        return made.eval()

    return load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a tokenizer; not to be written to."""
    return written(tmp_path_factory.mktemp("hf") / "plain", checkpoint())


@pytest.fixture(scope="module")
def ours() -> TokenFormer:
    """What is in `folder`."""
    return checkpoint().model


@pytest.fixture
def theirs(load: Load, folder: Path) -> nn.Module:
    """What transformers makes of `folder`."""
    return load(folder)


@pytest.fixture(scope="module")
def tokenizer(corpus: TextCorpus) -> Tokenizer:
    return train_tokenizer(TokenizerConfig(vocab_size=VOCAB_SIZE), corpus)


def with_tokenizer(tokenizer: Tokenizer) -> Checkpoint:
    texts = {"tokenizer": tokenizer.to_json(), "end_of_text": tokenizer.end_of_text_token}
    return replace(checkpoint(), **texts)


class TestFolder:
    def test_a_model_alone(self, folder: Path) -> None:
        assert {path.name for path in folder.iterdir()} == MODEL_FILES
        config = json.loads((folder / "config.json").read_text())
        assert (config["model_type"], config["dtype"]) == ("tokenformer", "float32")
        assert (config["hidden_size"], config["num_attention_heads"]) == (24, 3)
        assert (config["num_hidden_layers"], config["max_position_embeddings"]) == (2, 32)
        assert config["tau"] == {"query": 2.0, "key": 3.0, "value": 2.5, "output": 1.7, "ffn": 4.0}
        assert config["eos_token_id"] is config["bos_token_id"] is config["pad_token_id"] is None

    def test_a_tokenizer_brings_its_files_and_ids(
        self, tmp_path: Path, tokenizer: Tokenizer
    ) -> None:
        folder = written(tmp_path / "hf", with_tokenizer(tokenizer))
        files = {path.name for path in folder.iterdir()}
        assert files == MODEL_FILES | {"tokenizer.json", "tokenizer_config.json"}
        for name in ("config.json", "generation_config.json"):
            values = json.loads((folder / name).read_text())
            assert {values[f"{token}_token_id"] for token in ("bos", "eos", "pad")} == {0}

    def test_json_is_sorted_and_ends_in_a_newline(
        self, tmp_path: Path, tokenizer: Tokenizer
    ) -> None:
        folder = written(tmp_path / "hf", with_tokenizer(tokenizer))
        for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
            text = (folder / name).read_text()
            assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"

    def test_weights_keep_their_dtype(self, tmp_path: Path) -> None:
        source = checkpoint(torch.bfloat16)
        path = written(tmp_path / "hf", source) / "model.safetensors"
        weights = {f"model.{name}": tensor for name, tensor in source.weights.items()}
        assert same_weights(load_file(path), weights)
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}

    def test_of_mixed_weights_none_is_rounded(self, load: Load, tmp_path: Path) -> None:
        source = checkpoint()
        half = source.weights["embedding.weight"].half()
        mixed = replace(source, weights={**source.weights, "embedding.weight": half})
        state = load(written(tmp_path / "hf", mixed)).state_dict()
        assert state["model.embedding.weight"].dtype == torch.float32
        for name, tensor in mixed.weights.items():
            assert torch.equal(state[f"model.{name}"], tensor.float()), name

    @pytest.mark.parametrize(
        ("changes", "message"),
        [({"tokenizer": "{}"}, "no tokenizers JSON"), ({"end_of_text": "<eod>"}, "<eod>")],
    )
    def test_a_tokenizer_that_is_none_is_refused(
        self, tmp_path: Path, tokenizer: Tokenizer, changes: dict[str, str], message: str
    ) -> None:
        with pytest.raises(UserError, match=message):
            write_hf(tmp_path, replace(with_tokenizer(tokenizer), **changes))


class TestLogits:
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_are_ours(self, load: Load, tmp_path: Path, activation: str) -> None:
        source = checkpoint(activation=activation)
        folder, ids = written(tmp_path / activation, source), random_ids(3, 12)
        wide = TokenFormer.from_weights(source.config, source.weights, torch.float64)
        with torch.no_grad():
            assert source.model(ids).std() > 0.5
            assert distance(load(folder)(ids).logits, source.model(ids)) <= 1e-6
            assert distance(load(folder, dtype=torch.float64)(ids).logits, wide(ids)) <= 1e-12

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_in_half_precision(
        self, load: Load, folder: Path, ours: TokenFormer, dtype: torch.dtype
    ) -> None:
        model, ids = load(folder, dtype=dtype), random_ids(3, 12)
        half = TokenFormer.from_weights(ours.config, ours.to_weights(), dtype)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, half(ids))
        assert model.generate(ids, max_new_tokens=3).shape == (3, 15)

    def test_of_embeddings(self, theirs: nn.Module) -> None:
        ids = random_ids(3, 12)
        embedded = theirs.get_input_embeddings()(ids)
        assert torch.equal(theirs(inputs_embeds=embedded).logits, theirs(ids).logits)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_zero_rows_have_finite_logits_and_gradients(
        self, load: Load, tmp_path: Path, activation: str
    ) -> None:
        model = load(written(tmp_path / f"zero_{activation}", checkpoint(activation=activation)))
        zeros = torch.zeros(1, 4, 24, requires_grad=True)
        logits = model(inputs_embeds=zeros).logits
        logits.square().sum().backward()
        assert logits.isfinite().all()
        assert zeros.grad is not None and zeros.grad.isfinite().all()

    def test_of_the_last_or_of_chosen_positions(self, theirs: nn.Module) -> None:
        ids, chosen = random_ids(3, 12), torch.tensor([1, 4])
        logits = theirs(ids).logits
        assert distance(theirs(ids, logits_to_keep=2).logits, logits[:, -2:]) <= 1e-5
        assert distance(theirs(ids, logits_to_keep=chosen).logits, logits[:, chosen]) <= 1e-5

    def test_hidden_states_run_from_the_embedding_to_the_final_norm(
        self, hub: ModuleType, theirs: nn.Module, folder: Path
    ) -> None:
        ids = random_ids(3, 12)
        output = theirs(ids, output_hidden_states=True)
        assert len(output.hidden_states) == 2 + 1
        assert torch.equal(output.hidden_states[0], theirs.get_input_embeddings()(ids))
        base = hub.AutoModel.from_pretrained(folder, trust_remote_code=True)
        assert torch.equal(output.hidden_states[-1], base(ids).last_hidden_state)
        assert theirs(ids).hidden_states is None

    def test_as_a_tuple(self, theirs: nn.Module) -> None:
        ids = random_ids(3, 12)
        assert torch.equal(theirs(ids, return_dict=False)[0], theirs(ids).logits)

    def test_what_is_no_input_is_refused(self, theirs: nn.Module) -> None:
        with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
            theirs()
        with pytest.raises(ValueError, match=r"give \[3, 12\]"):
            theirs(random_ids(3, 12), attention_mask=torch.ones(3, 11))


class TestGenerate:
    @pytest.mark.parametrize("use_cache", [True, False])
    def test_plainly_is_greedily(
        self, theirs: nn.Module, ours: TokenFormer, use_cache: bool
    ) -> None:
        ids = random_ids(3, 12)
        found = theirs.generate(ids, max_new_tokens=10, use_cache=use_cache)
        greedy = list(generate(ours, ids, SamplingConfig(max_tokens=10, temperature=0)))
        assert torch.equal(found, torch.cat([ids, torch.stack(greedy, dim=1)], dim=1))

    def test_chunks_behind_a_prefix_are_causal(self, theirs: nn.Module) -> None:
        ids, cache, logits = random_ids(3, 12), None, []
        for chunk in ids.split([5, 4, 1, 2], dim=1):
            output = theirs(chunk, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
        assert distance(torch.cat(logits, dim=1), theirs(ids).logits) <= 1e-5

    @pytest.mark.parametrize("use_cache", [True, False])
    def test_a_padded_batch_as_each_prompt_alone(self, theirs: nn.Module, use_cache: bool) -> None:
        prompts = [row[:length] for row, length in zip(random_ids(3, 12), (12, 7, 3), strict=True)]
        ids = torch.stack([F.pad(prompt, (12 - len(prompt), 0)) for prompt in prompts])
        mask = torch.stack([F.pad(torch.ones_like(p), (12 - len(p), 0)) for p in prompts])
        options = {"max_new_tokens": 10, "use_cache": use_cache}
        together = theirs.generate(ids, attention_mask=mask, pad_token_id=0, **options)
        for row, prompt in zip(together, prompts, strict=True):
            assert torch.equal(row[12 - len(prompt) :], theirs.generate(prompt[None], **options)[0])

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_leaves_the_logits_alone(self, theirs: nn.Module, side: str) -> None:
        short = random_ids(1, 7)
        padding = (5, 0) if side == "left" else (0, 5)
        ids, mask = F.pad(short, padding), F.pad(torch.ones_like(short), padding)
        logits = theirs(ids, attention_mask=mask).logits
        assert logits.isfinite().all()
        assert distance(logits[mask.bool()], theirs(short).logits[0]) <= 1e-5

    def test_padding_sees_itself_where_some_kernels_would_make_it_nan(
        self, theirs: nn.Module
    ) -> None:
        visible_keys = sys.modules[type(theirs).__module__].visible_keys
        mask = torch.tensor([[0, 0, 1, 1]])
        seen = visible_keys(mask, past=1, length=3, device=mask.device)
        assert seen[0, 0].int().tolist() == [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]

    def test_until_the_end_of_text(self, load: Load, tmp_path: Path, tokenizer: Tokenizer) -> None:
        source = with_tokenizer(tokenizer)
        biased = source.weights | {"final_norm.bias": 50 * source.weights["embedding.weight"][0]}
        folder = written(tmp_path / "ends", replace(source, weights=biased))
        ids = random_ids(1, 4)
        found = load(folder).generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9)
        assert found[0, 4:].tolist() == [0]


class TestTraining:
    def test_the_loss_shifts_labels_and_leaves_out_minus_100(
        self, theirs: nn.Module, ours: TokenFormer
    ) -> None:
        ids = random_ids(3, 12)
        labels = ids.clone()
        labels[:, :3] = -100
        wanted = F.cross_entropy(ours(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        assert theirs(ids, labels=labels).loss.item() == pytest.approx(wanted.item(), rel=1e-6)
        whole = theirs(ids, labels=labels, num_items_in_batch=270).loss  # of 10 batches like this
        assert whole.item() == pytest.approx(wanted.item() / 10, rel=1e-6)

    def test_gradients_are_ours(self, theirs: nn.Module, ours: TokenFormer) -> None:
        ids = random_ids(3, 12)
        theirs.train()(ids, labels=ids).loss.backward()
        F.cross_entropy(ours(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        found = dict(theirs.named_parameters())
        for name, weight in ours.named_parameters():
            assert distance(found[f"model.{name}"].grad, weight.grad) <= 1e-6, name

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gradient_checkpointing_leaves_the_gradients(
        self, load: Load, folder: Path, use_reentrant: bool
    ) -> None:
        plain, saving, ids = load(folder).train(), load(folder).train(), random_ids(3, 12)
        saving.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        for model in (plain, saving):
            output = model(ids, labels=ids)
            output.loss.backward()
        assert output.past_key_values is None
        for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)

    def test_padding_has_finite_gradients(self, theirs: nn.Module) -> None:
        ids = random_ids(1, 12)
        mask = (torch.arange(12) >= 5).long()[None]
        labels = ids.masked_fill(mask == 0, -100)
        theirs(ids, attention_mask=mask, labels=labels).loss.backward()
        assert all(weight.grad.isfinite().all() for weight in theirs.parameters())

    @pytest.mark.parametrize("init", ["published", "balanced"])
    def test_new_weights_are_drawn_as_ours(self, hub: ModuleType, folder: Path, init: str) -> None:
        config = hub.AutoConfig.from_pretrained(folder, trust_remote_code=True, init=init)
        torch.manual_seed(0)
        made = hub.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        ours = TokenFormer(replace(checkpoint().config, init=init))
        for name, weight in made.model.state_dict().items():
            wanted = ours.state_dict()[name]
            assert weight.std().item() == pytest.approx(wanted.std().item(), rel=0.2), name
            assert weight.mean().item() == pytest.approx(wanted.mean().item(), abs=0.1), name
        assert made.lm_head.weight is made.model.embedding.weight


class TestEmbeddings:
    def test_the_output_head_is_the_embedding(self, theirs: nn.Module) -> None:
        embedding = nn.Embedding(VOCAB_SIZE, 24)
        theirs.set_input_embeddings(embedding)
        theirs.tie_weights()
        assert theirs.get_input_embeddings() is embedding
        assert theirs.get_output_embeddings().weight is embedding.weight

    def test_a_resized_vocabulary_comes_back(
        self, load: Load, theirs: nn.Module, tmp_path: Path
    ) -> None:
        ids = random_ids(3, 12)
        theirs.resize_token_embeddings(VOCAB_SIZE + 8, mean_resizing=False)
        theirs.save_pretrained(tmp_path / "resized")
        logits = load(tmp_path / "resized")(ids).logits
        assert logits.shape[-1] == VOCAB_SIZE + 8
        assert torch.equal(logits, theirs(ids).logits)
        assert distance(read_hf(tmp_path / "resized").model(ids), logits) <= 1e-6


class TestSaving:
    def test_every_weight_comes_back_bit_for_bit(
        self, load: Load, theirs: nn.Module, tmp_path: Path
    ) -> None:
        theirs.save_pretrained(tmp_path / "saved")
        assert {path.name for path in (tmp_path / "saved").iterdir()} == MODEL_FILES
        assert same_weights(load(tmp_path / "saved").state_dict(), theirs.state_dict())

    def test_a_process_without_tokengrow_runs_it(
        self, theirs: nn.Module, folder: Path, tmp_path: Path
    ) -> None:
        theirs.save_pretrained(tmp_path / "saved")
        code = (
            "import sys; sys.modules['tokengrow'] = None\n"
            "import torch; from transformers import AutoModelForCausalLM\n"
            "for folder in sys.argv[1:]:\n"
            "    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
            "    print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5).tolist())\n"
        )
        paths = {key: str(tmp_path / "home") for key in ("HF_HOME", "HF_MODULES_CACHE")}
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code, folder, tmp_path / "saved"],
            cwd=tmp_path,
            env=os.environ | paths | {"HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        wanted = theirs.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5).tolist()
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{wanted}\n" * 2


class TestReading:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_what_was_written(
        self, tmp_path: Path, tokenizer: Tokenizer, dtype: torch.dtype
    ) -> None:
        source = replace(with_tokenizer(tokenizer), weights=checkpoint(dtype).weights)
        found = read_hf(written(tmp_path / "hf", source))
        assert found.config == source.config
        assert same_weights(found.weights, source.weights)
        assert (found.tokenizer, found.end_of_text) == (source.tokenizer, source.end_of_text)

    @pytest.mark.parametrize("max_shard_size", ["1GB", "10KB"])
    def test_what_transformers_saved(
        self, hub: ModuleType, load: Load, tmp_path: Path, tokenizer: Tokenizer, max_shard_size: str
    ) -> None:
        source, saved = with_tokenizer(tokenizer), tmp_path / "saved"
        folder = written(tmp_path / "hf", source)
        load(folder).save_pretrained(saved, max_shard_size=max_shard_size)
        hub.AutoTokenizer.from_pretrained(folder, trust_remote_code=True).save_pretrained(saved)
        assert len(list(saved.glob("*.safetensors"))) == {"1GB": 1, "10KB": 5}[max_shard_size]
        found = read_hf(saved)
        assert found.config == source.config
        assert same_weights(found.weights, source.weights)
        assert found.tokenizer is not None and found.end_of_text == source.end_of_text
        text = "def add(a, b):\n    return a + b"
        assert Tokenizer.from_json(found.tokenizer).encode(text) == tokenizer.encode(text)

    def test_every_wrong_tensor_is_named_at_once(self, folder: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(folder, tmp_path / "hf"))
        weights = load_file(copy / "model.safetensors")
        del weights["model.final_norm.bias"]
        weights["model.final_norm.weight"] = torch.zeros(23)
        save_file(weights | {"lm_head.weight": torch.zeros(2)}, copy / "model.safetensors")
        with pytest.raises(UserError) as error:
            read_hf(copy)
        assert (
            "lm_head.weight is too much, model.final_norm.bias is missing, "
            "model.final_norm.weight is [23], not [24]"
        ) in str(error.value)

    @pytest.mark.parametrize(
        ("file", "content", "message"),
        [
            ("config.json", "{", "config.json is damaged"),
            ("config.json", "[]", "config.json is damaged"),
            ("config.json", '{"model_type": "llama"}', "model_type is 'llama'"),
            ("config.json", '{"model_type": "tokenformer"}', "lacks vocab_size, max_position"),
            ("model.safetensors", "{}", "model.safetensors is damaged"),
            ("model.safetensors", None, "model.safetensors is missing"),
            ("tokenizer.json", "{}", "tokenizer.json is no tokenizers JSON"),
        ],
    )
    def test_a_damaged_file_is_named(
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
            ({"weight_map": {"a": "b.safetensors"}}, "b.safetensors is missing"),
        ],
    )
    def test_a_damaged_index_is_named(
        self, folder: Path, tmp_path: Path, index: dict[str, Any], message: str
    ) -> None:
        copy = Path(shutil.copytree(folder, tmp_path / "hf"))
        (copy / "model.safetensors").unlink()
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match=message):
            read_hf(copy)

    def test_a_folder_is_known_by_its_config(self, folder: Path, tmp_path: Path) -> None:
        assert is_hf(folder)
        assert not is_hf(tmp_path)
        for content in ("{", "[]", '{"model_type": "llama"}'):
            (tmp_path / "config.json").write_text(content)
            assert not is_hf(tmp_path)


class TestTokenizer:
    TEXT = "def add(a, b):\n\treturn a  +  b # Zoë ⟨x⟩ , isn 't\n"

    def test_has_our_ids_and_one_special_token(
        self, hub: ModuleType, tmp_path: Path, tokenizer: Tokenizer
    ) -> None:
        folder = written(tmp_path / "hf", with_tokenizer(tokenizer))
        found = hub.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        ids = tokenizer.encode(self.TEXT)
        assert found(self.TEXT).input_ids == ids
        assert found.decode(ids) == self.TEXT
        assert found.bos_token_id == found.eos_token_id == found.pad_token_id == 0
        assert found.model_max_length == 32

    def test_pads_what_the_model_then_goes_on_with(
        self, hub: ModuleType, load: Load, tmp_path: Path, tokenizer: Tokenizer
    ) -> None:
        folder = written(tmp_path / "hf", with_tokenizer(tokenizer))
        found = hub.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        batch = found(["import os", "x"], return_tensors="pt", padding=True)
        assert batch.attention_mask[1].tolist()[-1] == 1
        assert load(folder).generate(**batch, max_new_tokens=3).shape[0] == 2

    def test_adds_nothing_around_a_text(self, hub: ModuleType, tmp_path: Path) -> None:
        inner = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2}, unk_token="<s>"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        inner.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
        texts = {"tokenizer": inner.to_str(), "end_of_text": "<s>"}
        folder = written(tmp_path / "hf", replace(checkpoint(), **texts))
        found = hub.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert found("a b").input_ids == [1, 2]

    def test_keeps_the_space_before_the_first_word(
        self, hub: ModuleType, tmp_path: Path, tokenizer: Tokenizer
    ) -> None:
        inner = tokenizers.Tokenizer.from_str(tokenizer.to_json())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        spaced = Tokenizer(inner)
        folder = written(tmp_path / "hf", with_tokenizer(spaced))
        # transformers 4 believes this file, 5 tokenizer.json.
        assert json.loads((folder / "tokenizer_config.json").read_text())["add_prefix_space"]
        found = hub.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert found("import os").input_ids == spaced.encode("import os")
        assert spaced.encode("import os") != tokenizer.encode("import os")
