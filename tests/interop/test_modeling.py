"""What transformers does with an exported model, by the code that travels with it."""

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
    checkpoint,
    distance,
    random_ids,
    same_weights,
    with_tokenizer,
    written,
)
from torch import nn

from tokengrow.data.tokenizer import Tokenizer
from tokengrow.generation.sampling import SamplingConfig, generate
from tokengrow.interop.hf import read_hf
from tokengrow.kernels.reference import ACTIVATIONS
from tokengrow.model.tokenformer import TokenFormer

Load = Callable[..., nn.Module]


@pytest.fixture(scope="module")
def ours() -> TokenFormer:
    """What is in `folder`."""
    return checkpoint().model


@pytest.fixture
def theirs(load: Load, folder: Path) -> nn.Module:
    """What transformers makes of `folder`."""
    return load(folder)


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

    def test_under_a_repetition_penalty(self, theirs: nn.Module, ours: TokenFormer) -> None:
        ids, penalty = random_ids(3, 12), 1.7
        found = theirs.generate(ids, max_new_tokens=20, repetition_penalty=penalty)
        config = SamplingConfig(max_tokens=20, temperature=0, repetition_penalty=penalty)
        greedy = torch.stack(list(generate(ours, ids, config)), dim=1)
        assert torch.equal(found[:, 12:], greedy)
        free = torch.stack(list(generate(ours, ids, replace(config, repetition_penalty=1.0))), 1)
        assert (free != greedy).any()

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
        # transformers 5.23 calls it so and warns of the other name, which 5.17 has alone.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        enable = next(getattr(saving, name) for name in names if hasattr(saving, name))
        enable({"use_reentrant": use_reentrant})
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
