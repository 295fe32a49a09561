"""Tests of the TokenFormer: published figures, cache and initialisation."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokengrow.generation.sampling import SamplingConfig, generate
from tokengrow.kernels.reference import ACTIVATIONS
from tokengrow.model.config import ModelConfig, ParameterTokens
from tokengrow.model.tokenformer import KVCache, TokenFormer

Figures = dict[str, Tensor]


def distance(actual: Tensor, reference: Tensor) -> float:
    assert actual.shape == reference.shape
    return (actual - reference).abs().max().item()


def config(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 50,
        "context_length": 16,
        "layers": 2,
        "width": 16,
        "heads": 2,
        "tokens": ParameterTokens(query=12, key=12, value=12, output=10, ffn=24),
        "init": "published",
    }
    return ModelConfig(**{**sizes, **changes})


def model(**changes: Any) -> TokenFormer:
    built = TokenFormer(config(**changes)).eval()
    built.init_weights(torch.Generator().manual_seed(0))
    return built


def random_ids(*shape: int) -> Tensor:
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(1))


def record_outputs(modules: dict[str, nn.Module], run: TokenFormer, ids: Tensor) -> Figures:
    """Return the output of each module in one forward pass."""
    outputs: Figures = {}
    for name, module in modules.items():
        module.register_forward_hook(lambda _, __, out, name=name: outputs.update({name: out}))
    with torch.no_grad():
        run(ids)
    return outputs


class TestPublishedFigures:
    def test_logits(self, published_model: TokenFormer, published_figures: Figures) -> None:
        logits = published_model(published_figures["input_ids"])
        assert logits.dtype == torch.float32
        assert distance(logits, published_figures["logits"]) <= 5e-6

    def test_hidden_states_after_every_block(
        self, published_model: TokenFormer, published_figures: Figures
    ) -> None:
        modules = {
            "embedding": published_model.embedding,
            **{f"layer_{i}": block for i, block in enumerate(published_model.blocks)},
            "final_norm": published_model.final_norm,
        }
        outputs = record_outputs(modules, published_model, published_figures["input_ids"])
        for name in modules:
            assert distance(outputs[name], published_figures[f"hidden.{name}"]) <= 2e-5, name

    def test_every_pattention_layer_of_the_first_block(
        self, published_model: TokenFormer, published_figures: Figures
    ) -> None:
        block = published_model.blocks[0]
        modules = {
            "query": block.attention.query,
            "key": block.attention.key,
            "value": block.attention.value,
            "proj": block.attention.output,
            "mlp": block.ffn,
        }
        outputs = record_outputs(modules, published_model, published_figures["input_ids"])
        for name in modules:
            assert distance(outputs[name], published_figures[f"layer0.{name}"]) <= 2e-5, name

    def test_loss_of_every_token(
        self, published_model: TokenFormer, published_figures: Figures
    ) -> None:
        logits = published_model(published_figures["input_ids"])
        loss = F.cross_entropy(
            logits.transpose(1, 2), published_figures["labels"], reduction="none"
        )
        assert distance(loss, published_figures["per_token_loss"]) <= 5e-6
        assert distance(loss.mean()[None], published_figures["loss"]) <= 5e-6

    def test_gradient_of_every_parameter(
        self, published_model: TokenFormer, published_figures: Figures
    ) -> None:
        logits = published_model(published_figures["input_ids"])
        F.cross_entropy(logits.flatten(0, 1), published_figures["labels"].flatten()).backward()
        gradients = {name: p.grad for name, p in published_model.named_parameters()}
        assert len(gradients) == 33
        for name, gradient in gradients.items():
            reference = published_figures[f"grad.{name}"]
            assert gradient is not None
            assert ((gradient - reference).norm() / reference.norm()).item() <= 2e-5, name

    def test_float64(
        self, published_config: ModelConfig, published_weights: Figures, published_figures: Figures
    ) -> None:
        wide = TokenFormer.from_weights(published_config, published_weights, torch.float64)
        logits = wide(published_figures["input_ids"])
        assert distance(logits[:, -1], published_figures["f64.logits_last_position"]) <= 1e-10
        loss = F.cross_entropy(
            logits.transpose(1, 2), published_figures["labels"], reduction="none"
        )
        assert distance(loss, published_figures["f64.per_token_loss"]) <= 1e-10


@torch.no_grad()
def cached_logits(run: TokenFormer, ids: Tensor, chunks: list[int], cache: KVCache) -> Tensor:
    """Return the logits of all positions, computed with a cache in chunks of these lengths."""
    return torch.cat([run(chunk, cache) for chunk in ids.split(chunks, dim=1)], dim=1)


class TestPublishedDecoding:
    def test_one_token_at_a_time(
        self, published_model: TokenFormer, published_decoding: Figures
    ) -> None:
        cache = KVCache(published_model.config, 2, 32)
        actual = cached_logits(published_model, published_decoding["input_ids"], [1] * 32, cache)
        assert distance(actual, published_decoding["stepwise_cached_logits"]) <= 5e-6
        assert distance(actual, published_decoding["full_forward_logits"]) <= 5e-6

    def test_prefill_of_eight_tokens_then_single_tokens(
        self, published_model: TokenFormer, published_decoding: Figures
    ) -> None:
        cache = KVCache(published_model.config, 2, 32)
        chunks = [8] + [1] * 24
        actual = cached_logits(published_model, published_decoding["input_ids"], chunks, cache)
        assert distance(actual, published_decoding["prefill8_then_steps_logits"]) <= 5e-6

    @pytest.mark.parametrize("chunks", [[8, 4, 20], [1, 31], [16, 16], [3, 1, 5, 23]])
    def test_chunks_after_a_prefix_are_causal(
        self, published_model: TokenFormer, published_decoding: Figures, chunks: list[int]
    ) -> None:
        # The published code is not causal here: four tokens after eight are off by 0.09.
        cache = KVCache(published_model.config, 2, 32)
        actual = cached_logits(published_model, published_decoding["input_ids"], chunks, cache)
        assert distance(actual, published_decoding["full_forward_logits"]) <= 5e-6

    def test_every_prefix(self, published_model: TokenFormer, published_decoding: Figures) -> None:
        for length in range(1, 17):
            with torch.no_grad():
                logits = published_model(published_decoding["input_ids"][:, :length])
            reference = published_decoding[f"prefix_{length:02}.last_logits"]
            assert distance(logits[:, -1], reference) <= 5e-6

    def test_cache_has_the_published_keys_and_values(
        self, published_model: TokenFormer, published_decoding: Figures
    ) -> None:
        cache = KVCache(published_model.config, 2, 32)
        cached_logits(published_model, published_decoding["input_ids"], [1] * 32, cache)
        assert cache.length == cache.capacity == 32
        for layer in range(3):
            reference = published_decoding[f"cache.layer_{layer}"]  # [2, S, B, H, C]
            keys, values = reference.permute(0, 2, 3, 1, 4)
            assert distance(cache.keys[layer], keys) <= 2e-5
            assert distance(cache.values[layer], values) <= 2e-5

    def test_greedy_tokens_exactly(
        self, published_model: TokenFormer, published_decoding: Figures
    ) -> None:
        tokens = published_decoding["greedy.tokens"]
        sampling = SamplingConfig(max_tokens=16, temperature=0)
        actual = torch.stack(list(generate(published_model, tokens[:, :8], sampling)), dim=1)
        assert torch.equal(actual, tokens[:, 8:])


class TestCache:
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_cached_logits_equal_those_of_the_full_text(self, activation: str) -> None:
        run, ids = model(activation=activation, head_dim=12), random_ids(3, 16)
        with torch.no_grad():
            full = run(ids)
        cache = KVCache(run.config, 3, 20)
        assert distance(cached_logits(run, ids, [5, 1, 4, 6], cache), full) <= 5e-6

    def test_full_cache_refuses_a_token_and_is_unchanged(self) -> None:
        run, cache = model(), KVCache(config(), 1, 4)
        run(random_ids(1, 3), cache)
        keys = cache.keys[:, :, :, :3].clone()
        with pytest.raises(ValueError, match="must hold 5 tokens, but has 4 slots"):
            run(random_ids(1, 2), cache)
        assert cache.length == 3
        assert torch.equal(cache.keys[:, :, :, :3], keys)

    def test_cache_keeps_its_dtype_under_autocast(self) -> None:
        run, ids = model(), random_ids(2, 16)
        cache = KVCache(run.config, 2, 16)
        with torch.autocast("cpu", torch.bfloat16):
            actual = cached_logits(run, ids, [8] + [1] * 8, cache)
        assert cache.keys.dtype == torch.float32
        with torch.no_grad():
            full = run(ids)
        assert (actual.float() - full).norm() / full.norm() < 0.05

    def test_float64_model_decodes_in_float64(self) -> None:
        run, ids = model().double(), random_ids(2, 16)
        with torch.no_grad():
            full = run(ids)
        cache = KVCache(run.config, 2, 16, torch.float64)
        assert distance(cached_logits(run, ids, [4] * 4, cache), full) <= 1e-12


class TestForward:
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_later_token_does_not_change_earlier_logits(self, activation: str) -> None:
        run, ids = model(activation=activation), random_ids(2, 12)
        changed = ids.clone()
        changed[:, 7] = (ids[:, 7] + 1) % 50
        with torch.no_grad():
            before, after = run(ids), run(changed)
        assert torch.equal(before[:, :7], after[:, :7])
        assert (before[:, 7:] != after[:, 7:]).any(dim=-1).all()

    def test_rows_of_a_batch_are_independent(self) -> None:
        run, ids = model(), random_ids(3, 12)
        with torch.no_grad():
            single = torch.cat([run(row[None]) for row in ids])
            assert distance(run(ids), single) <= 5e-6

    def test_text_of_one_token(self) -> None:
        assert model()(random_ids(1, 1)).shape == (1, 1, 50)

    def test_embedding_is_the_output_head(self) -> None:
        run = model()
        assert not any("head" in name for name in run.state_dict())
        run(random_ids(1, 4))[..., 49].sum().backward()
        assert run.embedding.weight.grad is not None
        assert run.embedding.weight.grad[49].abs().max() > 0

    def test_text_may_exceed_the_context_length(self) -> None:
        # Rotary positions have no maximum; context_length is only the length in training.
        assert model()(random_ids(1, 40)).isfinite().all()

    def test_bfloat16(self) -> None:
        exact = model()
        narrow = TokenFormer.from_weights(exact.config, exact.state_dict(), torch.bfloat16)
        ids = random_ids(2, 16)
        with torch.no_grad():
            logits, reference = narrow(ids), exact(ids)
        assert logits.dtype == torch.bfloat16
        assert (logits.float() - reference).norm() / reference.norm() < 0.05


class TestFromWeights:
    def test_weights_are_copied(self) -> None:
        source = model()
        copy = TokenFormer.from_weights(source.config, source.state_dict())
        with torch.no_grad():
            copy.embedding.weight.zero_()
        assert source.embedding.weight.abs().max() > 0

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_dtype_is_that_of_the_weights_by_default(self, dtype: torch.dtype) -> None:
        weights = {name: t.to(dtype) for name, t in model().state_dict().items()}
        kept = TokenFormer.from_weights(config(), weights)
        assert {p.dtype for p in kept.parameters()} == {dtype}
        given = TokenFormer.from_weights(config(), weights, torch.float64)
        assert {p.dtype for p in given.parameters()} == {torch.float64}
        assert all(torch.equal(t, kept.state_dict()[name]) for name, t in weights.items())

    def test_mixed_dtypes_are_not_rounded(self) -> None:
        weights = model().state_dict()
        weights["embedding.weight"] = weights["embedding.weight"].half()
        mixed = TokenFormer.from_weights(config(), weights)
        assert {p.dtype for p in mixed.parameters()} == {torch.float32}
        assert all(torch.equal(t, mixed.state_dict()[name]) for name, t in weights.items())

    def test_model_is_in_eval_mode_and_trainable(self) -> None:
        copy = TokenFormer.from_weights(config(), model().state_dict())
        assert not copy.training
        assert all(p.requires_grad and p.device.type == "cpu" for p in copy.parameters())

    def test_global_generator_is_unchanged(self) -> None:
        weights = model().state_dict()
        before = torch.get_rng_state()
        TokenFormer.from_weights(config(), weights)
        assert torch.equal(torch.get_rng_state(), before)

    def test_weights_of_another_size_are_refused(self) -> None:
        with pytest.raises(RuntimeError, match="size mismatch"):
            TokenFormer.from_weights(config(vocab_size=51), model().state_dict())


class TestInitialisation:
    def test_one_seed_gives_the_same_weights(self) -> None:
        first, second, other = model(), model(), model()
        other.init_weights(torch.Generator().manual_seed(1))
        for name, tensor in first.state_dict().items():
            assert torch.equal(tensor, second.state_dict()[name])
            if not name.startswith("final_norm"):
                assert not torch.equal(tensor, other.state_dict()[name])

    def test_published_standard_deviations(self) -> None:
        large = model(
            layers=4,
            width=64,
            vocab_size=1000,
            tokens=ParameterTokens(query=300, key=300, value=300, output=300, ffn=600),
        )
        for name, tensor in large.state_dict().items():
            if name.startswith("final_norm"):
                continue
            # Values: 2 / layers / sqrt(width) = 2 / 4 / 8.
            expected = 0.0625 if name.endswith("value_param_tokens") else 0.02
            assert tensor.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(tensor.mean().item()) < 0.03 * expected, name

    @pytest.mark.parametrize("init", ["published", "balanced"])
    def test_final_norm_starts_without_effect(self, init: str) -> None:
        norm = model(init=init).final_norm
        assert torch.equal(norm.weight, torch.ones(16))
        assert torch.equal(norm.bias, torch.zeros(16))

    @pytest.mark.parametrize("tokens", [64, 1024])
    def test_balanced_queries_keys_and_values_have_unit_variance(self, tokens: int) -> None:
        sizes = {role: tokens for role in ("query", "key", "value", "output", "ffn")}
        run = model(init="balanced", width=256, heads=4, tokens=ParameterTokens(**sizes))
        x = F.layer_norm(torch.randn(512, 256, generator=torch.Generator().manual_seed(2)), (256,))
        attention = run.blocks[0].attention
        with torch.no_grad():
            for projection in (attention.query, attention.key, attention.value):
                std = projection(x).square().mean().sqrt().item()
                assert std == pytest.approx(1.0, rel=0.05)

    def test_balanced_blocks_start_as_the_identity(self) -> None:
        run, ids = model(init="balanced"), random_ids(2, 16)
        outputs = record_outputs({"first": run.embedding, "last": run.blocks[-1]}, run, ids)
        assert torch.equal(outputs["first"], outputs["last"])

    def test_balanced_blocks_have_gradients(self) -> None:
        run, ids = model(init="balanced"), random_ids(2, 16)
        F.cross_entropy(run(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        for block in run.blocks:
            for layer in (block.attention.output, block.ffn):
                assert layer.value_param_tokens.grad.abs().max() > 0

    def test_untrained_model_predicts_uniformly(self) -> None:
        run, ids = model(init="balanced", vocab_size=50), random_ids(4, 16)
        loss = F.cross_entropy(run(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        assert loss.item() == pytest.approx(math.log(50), rel=0.05)
