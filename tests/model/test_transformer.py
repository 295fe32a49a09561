"""Tests of the Transformer: equality with GPT-NeoX, cache, initialisation, sizes, config."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from tokengrow.errors import UserError
from tokengrow.generation.decoder import Decoder
from tokengrow.model.architectures import build_model, read_config
from tokengrow.model.config import ModelConfig, ParameterTokens
from tokengrow.model.tokenformer import KVCache
from tokengrow.model.transformer import Transformer, TransformerConfig


def config(**changes: Any) -> TransformerConfig:
    sizes = {"vocab_size": 50, "context_length": 16, "layers": 3, "width": 24, "heads": 2}
    return TransformerConfig(**{**sizes, "init": "published", **changes})


def model(dtype: torch.dtype = torch.float32, **changes: Any) -> Transformer:
    """Return a model with random weights, biases and norms; its logits have a std of about 1."""
    built = Transformer(config(**changes)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in built.named_parameters():
            tensor.normal_(float("norm.weight" in name), 0.2, generator=generator)
    return built.to(dtype)


def random_ids(*shape: int) -> Tensor:
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(1))


def as_neox(ours: Transformer) -> GPTNeoXForCausalLM:
    """Return the same model as a GPT-NeoX of transformers, with sequential sublayers."""
    size = ours.config
    theirs = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=size.vocab_size,
            max_position_embeddings=size.context_length,
            num_hidden_layers=size.layers,
            hidden_size=size.width,
            num_attention_heads=size.heads,
            intermediate_size=size.mlp_width,
            hidden_act="gelu",
            rotary_pct=0.25,
            layer_norm_eps=size.norm_eps,
            use_parallel_residual=False,
            tie_word_embeddings=size.tied,
            attn_implementation="eager",
        )
    )
    names = {
        "attention_norm": "input_layernorm",
        "attention.query_key_value": "attention.query_key_value",
        "attention.output": "attention.dense",
        "ffn_norm": "post_attention_layernorm",
        "ffn.up": "mlp.dense_h_to_4h",
        "ffn.down": "mlp.dense_4h_to_h",
    }
    weights = ours.to_weights()
    state = {"gpt_neox.embed_in.weight": weights["embedding.weight"]}
    for part in ("weight", "bias"):
        state[f"gpt_neox.final_layer_norm.{part}"] = weights[f"final_norm.{part}"]
        for layer in range(size.layers):
            for name, other in names.items():
                tensor = weights[f"blocks.{layer}.{name}.{part}"]
                if name.endswith("query_key_value"):  # GPT-NeoX groups the three of each head
                    heads = tensor.view(3, size.heads, size.head_dim, -1)
                    tensor = heads.transpose(0, 1).reshape(tensor.shape)
                state[f"gpt_neox.layers.{layer}.{other}.{part}"] = tensor
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    head = theirs.get_output_embeddings()  # its name differs between transformers 4 and 5
    assert all(
        dict(theirs.named_parameters()).get(name, head.weight) is head.weight for name in missing
    )
    with torch.no_grad():
        head.weight.copy_(ours.head_weight)
    return theirs.eval()


class TestLikeGPTNeoX:
    @pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
    def test_logits_equal_those_of_neox(self, tied: bool) -> None:
        ours, ids = model(tied=tied, width=32), random_ids(2, 16)
        with torch.no_grad():
            actual, reference = ours(ids), as_neox(ours)(ids).logits
        assert reference.std() > 0.5
        assert (actual - reference).abs().max() <= 1e-5

    def test_loss_is_the_mean_over_all_tokens(self) -> None:
        ours, ids = model(width=32), random_ids(2, 17)
        with torch.no_grad():
            actual = ours(ids[:, :-1], targets=ids[:, 1:])
            logits = as_neox(ours)(ids[:, :-1]).logits
        assert actual.item() == pytest.approx(F.cross_entropy(logits.mT, ids[:, 1:]).item(), 1e-5)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("sizes", [{}, {"head_dim": 20}, {"tied": False, "mlp_width": 40}])
class TestDecoding:
    @torch.no_grad()
    def test_chunks_with_a_cache_equal_the_full_forward(
        self, sizes: dict[str, Any], dtype: torch.dtype, limit: float
    ) -> None:
        run, ids = model(dtype, **sizes), random_ids(2, 12)
        cache = KVCache(run.config, batch=2, capacity=12, dtype=dtype)
        chunks = [run(part, cache) for part in ids.split([5, 1, 6], dim=1)]
        assert (torch.cat(chunks, dim=1) - run(ids)).abs().max() <= limit

    @torch.no_grad()
    def test_decoder_equals_the_full_forward(
        self, sizes: dict[str, Any], dtype: torch.dtype, limit: float
    ) -> None:
        run, ids = model(dtype, **sizes), random_ids(2, 12)
        decoder = Decoder(run, batch=2, capacity=12)
        logits = [decoder.prefill(ids[:, :5])]
        logits += [decoder.step(token).clone() for token in ids[:, 5:].unbind(1)]
        assert (torch.stack(logits, dim=1) - run(ids)[:, 4:]).abs().max() <= limit

    @torch.no_grad()
    def test_decoder_after_padding(
        self, sizes: dict[str, Any], dtype: torch.dtype, limit: float
    ) -> None:
        run, ids = model(dtype, **sizes), random_ids(2, 12)
        start = torch.tensor([0, 3])
        decoder = Decoder(run, batch=2, capacity=12)
        logits = [decoder.prefill(ids[:, :5], start)]
        logits += [decoder.step(token).clone() for token in ids[:, 5:].unbind(1)]
        single = [
            run(text[None, begin:])[0, 4 - begin :] for text, begin in zip(ids, start, strict=True)
        ]
        assert (torch.stack(logits, dim=1) - torch.stack(single)).abs().max() <= limit


class TestInitialWeights:
    @pytest.mark.parametrize("init", ["balanced", "published"])
    @pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
    def test_initial_weights_depend_only_on_the_generator(self, init: str, tied: bool) -> None:
        first, second, other = (Transformer(config(init=init, tied=tied)) for _ in range(3))
        for run, seed in ((first, 7), (second, 7), (other, 8)):
            run.init_weights(torch.Generator().manual_seed(seed))
        repeated, different = dict(second.named_parameters()), dict(other.named_parameters())
        for name, tensor in first.named_parameters():
            assert torch.equal(tensor, repeated[name])
            random = tensor.dim() == 2 and tensor.any()
            assert torch.equal(tensor, different[name]) != random, name

    def test_balanced_blocks_start_as_the_identity(self) -> None:
        run, ids = Transformer(config(init="balanced")), random_ids(2, 8)
        embedded = run.embedding(ids)
        assert torch.equal(run(ids), F.linear(run.final_norm(embedded), run.embedding.weight))

    def test_balanced_projections_have_unit_variance(self) -> None:
        run = Transformer(config(init="balanced", width=512, vocab_size=2048))
        x = run.embedding(torch.arange(2048))
        block = run.blocks[0]
        for channels in (
            block.attention.query_key_value(block.attention_norm(x)),
            block.ffn.up(block.ffn_norm(x)),
        ):
            # Corrected for the epsilon of the norm, with an embedding of standard deviation 0.02.
            variance = channels.var().item() * (1 + 1e-5 / 0.02**2)
            assert variance == pytest.approx(1.0, rel=0.01)

    def test_published_initialisation_is_that_of_pythia(self) -> None:
        run = Transformer(config(init="published", width=256, vocab_size=1024, tied=False))
        small, wang = math.sqrt(2 / (5 * 256)), 2 / 3 / math.sqrt(256)
        for name, tensor in run.named_parameters():
            if tensor.dim() == 1:
                assert (tensor == float("norm.weight" in name)).all(), name
                continue
            std = wang if name.endswith(("output.weight", "down.weight")) else small
            assert tensor.std().item() == pytest.approx(std, rel=0.02), name


class TestSizes:
    @pytest.mark.parametrize("changes", [{}, {"tied": False}, {"head_dim": 20}, {"mlp_width": 40}])
    def test_parameter_count_equals_that_of_a_built_model(self, changes: dict[str, Any]) -> None:
        built = Transformer(config(**changes))
        assert sum(p.numel() for p in built.parameters()) == built.config.num_parameters()

    def test_flops_by_hand(self) -> None:
        # D = 24, F = 96, 3 layers. A layer: projections 4 x 24 x 24 and 4 x 24 biases, 2 x 24 x 96
        # and 96 + 24 biases, 2 norms of 2 x 24. Then a norm of 2 x 24 and the head, 50 x 24.
        block = 4 * 24 * 24 + 4 * 24 + 2 * 24 * 96 + 96 + 24 + 4 * 24
        multiplied = 3 * block + 2 * 24 + 50 * 24
        attended = 6 * 3 * 16 * 24
        assert config().flops_per_token() == 6 * multiplied + attended
        # An untied embedding takes part in no product.
        assert config(tied=False).num_parameters() == multiplied + 50 * 24
        assert config(tied=False).flops_per_token() == 6 * multiplied + attended

    def test_feed_forward_layer_has_four_times_the_width(self) -> None:
        assert config().mlp_width == 96

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"mlp_width": -1}, "model.mlp_width must be at least 0, got -1"),
            ({"heads": 5}, "model.width must be a multiple of model.heads (5), got 24"),
            ({"init": "zero"}, "model.init must be one of balanced, published, got 'zero'"),
            ({"architecture": "tokenformer"}, "must be transformer, got 'tokenformer'"),
        ],
    )
    def test_invalid_sizes_are_refused(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError) as error:
            config(**changes)
        assert message in str(error.value)

    def test_from_weights_restores_to_weights(self) -> None:
        first = model(torch.bfloat16, tied=False)
        second = Transformer.from_weights(first.config, first.to_weights())
        assert torch.equal(first(random_ids(1, 8)), second(random_ids(1, 8)))


class TestArchitectures:
    def test_section_without_the_key_is_a_tokenformer(self) -> None:
        tokens = ParameterTokens(query=4, key=4, value=4, output=4, ffn=8)
        expected = ModelConfig(
            vocab_size=9, context_length=4, layers=1, width=8, heads=2, tokens=tokens
        )
        values = expected.to_dict()
        assert "architecture" not in values
        assert read_config(values) == expected
        assert read_config({**values, "architecture": "tokenformer"}) == expected

    def test_config_of_a_transformer_round_trips(self) -> None:
        expected = config(tied=False, mlp_width=40)
        assert expected.to_dict()["architecture"] == "transformer"
        assert read_config(expected.to_dict()) == expected
        assert isinstance(build_model(expected), Transformer)

    def test_unknown_architecture_is_refused_with_the_nearest(self) -> None:
        with pytest.raises(
            UserError, match=r"Unknown model\.architecture=transfomer\. Did you mean 'transformer'"
        ):
            read_config({**config().to_dict(), "architecture": "transfomer"})

    def test_key_of_another_architecture_is_refused(self) -> None:
        with pytest.raises(
            UserError, match=r"model\.tokens is a key of a tokenformer, but the model is a trans"
        ):
            read_config({**config().to_dict(), "tokens": {"ffn": 8}})
        with pytest.raises(UserError, match=r"model\.(mlp_width|tied) is a key of a tra"):
            read_config({**config().to_dict(), "architecture": "tokenformer"})
