"""Exported model in transformers: logits, generation, training, saving."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from exported import (
    MODEL_FILES,
    VOCAB_SIZE,
    checkpoint_with_tokenizer,
    equal_weights,
    export,
    max_difference,
    random_checkpoint,
    random_ids,
)
from torch import nn

from tokengrow.data.tokenizer import Tokenizer
from tokengrow.generation.sampling import SamplingConfig, generate
from tokengrow.interop.hf import read_hf
from tokengrow.kernels.reference import ACTIVATIONS
from tokengrow.model.tokenformer import TokenFormer

Load = Callable[..., nn.Module]


@pytest.fixture(scope="module")
def model() -> TokenFormer:
    """Model in `folder`, in tokengrow."""
    return random_checkpoint().model


@pytest.fixture
def hf_model(load: Load, folder: Path) -> nn.Module:
    """Model in `folder`, loaded by transformers."""
    return load(folder)


class TestLogits:
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_logits_equal_those_of_tokengrow(
        self, load: Load, tmp_path: Path, activation: str
    ) -> None:
        source = random_checkpoint(activation=activation)
        folder, ids = export(tmp_path / activation, source), random_ids(3, 12)
        wide = TokenFormer.from_weights(source.config, source.weights, torch.float64)
        with torch.no_grad():
            assert source.model(ids).std() > 0.5
            assert max_difference(load(folder)(ids).logits, source.model(ids)) <= 1e-6
            assert max_difference(load(folder, dtype=torch.float64)(ids).logits, wide(ids)) <= 1e-12

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_logits_are_equal(
        self, load: Load, folder: Path, model: TokenFormer, dtype: torch.dtype
    ) -> None:
        hf_model, ids = load(folder, dtype=dtype), random_ids(3, 12)
        half = TokenFormer.from_weights(model.config, model.to_weights(), dtype)
        with torch.no_grad():
            assert torch.equal(hf_model(ids).logits, half(ids))
        assert hf_model.generate(ids, max_new_tokens=3).shape == (3, 15)

    def test_embeddings_as_input_give_the_same_logits(self, hf_model: nn.Module) -> None:
        ids = random_ids(3, 12)
        embedded = hf_model.get_input_embeddings()(ids)
        assert torch.equal(hf_model(inputs_embeds=embedded).logits, hf_model(ids).logits)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_zero_rows_have_finite_logits_and_gradients(
        self, load: Load, tmp_path: Path, activation: str
    ) -> None:
        folder = export(tmp_path / activation, random_checkpoint(activation=activation))
        model = load(folder)
        zeros = torch.zeros(1, 4, 24, requires_grad=True)
        logits = model(inputs_embeds=zeros).logits
        logits.square().sum().backward()
        assert logits.isfinite().all()
        assert zeros.grad is not None and zeros.grad.isfinite().all()

    def test_logits_to_keep_selects_positions(self, hf_model: nn.Module) -> None:
        ids, chosen = random_ids(3, 12), torch.tensor([1, 4])
        logits = hf_model(ids).logits
        assert max_difference(hf_model(ids, logits_to_keep=2).logits, logits[:, -2:]) <= 1e-5
        assert (
            max_difference(hf_model(ids, logits_to_keep=chosen).logits, logits[:, chosen]) <= 1e-5
        )

    def test_hidden_states_start_at_embedding_and_end_at_final_norm(
        self, hub: ModuleType, hf_model: nn.Module, folder: Path
    ) -> None:
        ids = random_ids(3, 12)
        output = hf_model(ids, output_hidden_states=True)
        assert len(output.hidden_states) == 2 + 1
        assert torch.equal(output.hidden_states[0], hf_model.get_input_embeddings()(ids))
        base = hub.AutoModel.from_pretrained(folder, trust_remote_code=True)
        assert torch.equal(output.hidden_states[-1], base(ids).last_hidden_state)
        assert hf_model(ids).hidden_states is None

    def test_return_dict_false_returns_a_tuple(self, hf_model: nn.Module) -> None:
        ids = random_ids(3, 12)
        assert torch.equal(hf_model(ids, return_dict=False)[0], hf_model(ids).logits)

    def test_invalid_inputs_are_errors(self, hf_model: nn.Module) -> None:
        with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
            hf_model()
        with pytest.raises(
            ValueError, match=r"attention_mask must have shape \[3, 12\].*got \[3, 11\]"
        ):
            hf_model(random_ids(3, 12), attention_mask=torch.ones(3, 11))


class TestGenerate:
    @pytest.mark.parametrize("use_cache", [True, False])
    def test_default_generation_is_greedy(
        self, hf_model: nn.Module, model: TokenFormer, use_cache: bool
    ) -> None:
        ids = random_ids(3, 12)
        actual = hf_model.generate(ids, max_new_tokens=10, use_cache=use_cache)
        greedy = list(generate(model, ids, SamplingConfig(max_tokens=10, temperature=0)))
        assert torch.equal(actual, torch.cat([ids, torch.stack(greedy, dim=1)], dim=1))

    def test_repetition_penalty_equals_that_of_tokengrow(
        self, hf_model: nn.Module, model: TokenFormer
    ) -> None:
        ids, penalty = random_ids(3, 12), 1.7
        actual = hf_model.generate(ids, max_new_tokens=20, repetition_penalty=penalty)
        config = SamplingConfig(max_tokens=20, temperature=0, repetition_penalty=penalty)
        greedy = torch.stack(list(generate(model, ids, config)), dim=1)
        assert torch.equal(actual[:, 12:], greedy)
        free = torch.stack(list(generate(model, ids, replace(config, repetition_penalty=1.0))), 1)
        assert (free != greedy).any()

    def test_chunks_with_a_cache_are_causal(self, hf_model: nn.Module) -> None:
        ids, cache, logits = random_ids(3, 12), None, []
        for chunk in ids.split([5, 4, 1, 2], dim=1):
            output = hf_model(chunk, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
        assert max_difference(torch.cat(logits, dim=1), hf_model(ids).logits) <= 1e-5

    @pytest.mark.parametrize("use_cache", [True, False])
    def test_padded_batch_equals_single_prompts(self, hf_model: nn.Module, use_cache: bool) -> None:
        prompts = [row[:length] for row, length in zip(random_ids(3, 12), (12, 7, 3), strict=True)]
        ids = torch.stack([F.pad(prompt, (12 - len(prompt), 0)) for prompt in prompts])
        mask = torch.stack([F.pad(torch.ones_like(p), (12 - len(p), 0)) for p in prompts])
        options = {"max_new_tokens": 10, "use_cache": use_cache}
        together = hf_model.generate(ids, attention_mask=mask, pad_token_id=0, **options)
        for row, prompt in zip(together, prompts, strict=True):
            assert torch.equal(
                row[12 - len(prompt) :], hf_model.generate(prompt[None], **options)[0]
            )

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_does_not_change_the_logits(self, hf_model: nn.Module, side: str) -> None:
        short = random_ids(1, 7)
        padding = (5, 0) if side == "left" else (0, 5)
        ids, mask = F.pad(short, padding), F.pad(torch.ones_like(short), padding)
        logits = hf_model(ids, attention_mask=mask).logits
        assert logits.isfinite().all()
        assert max_difference(logits[mask.bool()], hf_model(short).logits[0]) <= 1e-5

    def test_padding_attends_to_itself_to_avoid_nan(self, hf_model: nn.Module) -> None:
        visible_keys = sys.modules[type(hf_model).__module__].visible_keys
        mask = torch.tensor([[0, 0, 1, 1]])
        visible = visible_keys(mask, past=1, length=3, device=mask.device)
        assert visible[0, 0].int().tolist() == [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]

    def test_generation_stops_at_the_end_of_text(
        self, load: Load, tmp_path: Path, tokenizer: Tokenizer
    ) -> None:
        source = checkpoint_with_tokenizer(tokenizer)
        biased = source.weights | {"final_norm.bias": 50 * source.weights["embedding.weight"][0]}
        folder = export(tmp_path / "ends", replace(source, weights=biased))
        ids = random_ids(1, 4)
        actual = load(folder).generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9)
        assert actual[0, 4:].tolist() == [0]


class TestTraining:
    def test_loss_shifts_labels_and_ignores_minus_100(
        self, hf_model: nn.Module, model: TokenFormer
    ) -> None:
        ids = random_ids(3, 12)
        labels = ids.clone()
        labels[:, :3] = -100
        expected = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        assert hf_model(ids, labels=labels).loss.item() == pytest.approx(expected.item(), rel=1e-6)
        scaled = hf_model(
            ids, labels=labels, num_items_in_batch=270
        ).loss  # items of 10 such batches
        assert scaled.item() == pytest.approx(expected.item() / 10, rel=1e-6)

    def test_gradients_equal_those_of_tokengrow(
        self, hf_model: nn.Module, model: TokenFormer
    ) -> None:
        ids = random_ids(3, 12)
        hf_model.train()(ids, labels=ids).loss.backward()
        F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        actual = dict(hf_model.named_parameters())
        for name, weight in model.named_parameters():
            assert max_difference(actual[f"model.{name}"].grad, weight.grad) <= 1e-6, name

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gradient_checkpointing_keeps_the_gradients(
        self, load: Load, folder: Path, use_reentrant: bool
    ) -> None:
        plain, checkpointed, ids = load(folder).train(), load(folder).train(), random_ids(3, 12)
        # transformers 5.23 has the first name and deprecates the second, the only one in 5.17.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        enable = next(getattr(checkpointed, name) for name in names if hasattr(checkpointed, name))
        enable({"use_reentrant": use_reentrant})
        for each in (plain, checkpointed):
            output = each(ids, labels=ids)
            output.loss.backward()
        assert output.past_key_values is None
        for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)

    def test_padding_has_finite_gradients(self, hf_model: nn.Module) -> None:
        ids = random_ids(1, 12)
        mask = (torch.arange(12) >= 5).long()[None]
        labels = ids.masked_fill(mask == 0, -100)
        hf_model(ids, attention_mask=mask, labels=labels).loss.backward()
        assert all(weight.grad.isfinite().all() for weight in hf_model.parameters())

    @pytest.mark.parametrize("init", ["published", "balanced"])
    def test_new_weights_have_the_distribution_of_tokengrow(
        self, hub: ModuleType, folder: Path, init: str
    ) -> None:
        config = hub.AutoConfig.from_pretrained(folder, trust_remote_code=True, init=init)
        torch.manual_seed(0)
        hf_model = hub.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        model = TokenFormer(replace(random_checkpoint().config, init=init))
        for name, weight in hf_model.model.state_dict().items():
            expected = model.state_dict()[name]
            assert weight.std().item() == pytest.approx(expected.std().item(), rel=0.2), name
            assert weight.mean().item() == pytest.approx(expected.mean().item(), abs=0.1), name
        assert hf_model.lm_head.weight is hf_model.model.embedding.weight


class TestEmbeddings:
    def test_output_head_is_tied_to_the_embedding(self, hf_model: nn.Module) -> None:
        embedding = nn.Embedding(VOCAB_SIZE, 24)
        hf_model.set_input_embeddings(embedding)
        hf_model.tie_weights()
        assert hf_model.get_input_embeddings() is embedding
        assert hf_model.get_output_embeddings().weight is embedding.weight

    def test_resized_vocabulary_is_saved_and_read(
        self, load: Load, hf_model: nn.Module, tmp_path: Path
    ) -> None:
        ids = random_ids(3, 12)
        hf_model.resize_token_embeddings(VOCAB_SIZE + 8, mean_resizing=False)
        hf_model.save_pretrained(tmp_path / "resized")
        logits = load(tmp_path / "resized")(ids).logits
        assert logits.shape[-1] == VOCAB_SIZE + 8
        assert torch.equal(logits, hf_model(ids).logits)
        assert max_difference(read_hf(tmp_path / "resized").model(ids), logits) <= 1e-6


class TestSaving:
    def test_saved_weights_are_identical(
        self, load: Load, hf_model: nn.Module, tmp_path: Path
    ) -> None:
        hf_model.save_pretrained(tmp_path / "saved")
        assert {path.name for path in (tmp_path / "saved").iterdir()} == MODEL_FILES
        assert equal_weights(load(tmp_path / "saved").state_dict(), hf_model.state_dict())

    def test_exported_code_runs_without_tokengrow(
        self, hf_model: nn.Module, folder: Path, tmp_path: Path
    ) -> None:
        hf_model.save_pretrained(tmp_path / "saved")
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
        expected = hf_model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5).tolist()
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{expected}\n" * 2
