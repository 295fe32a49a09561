"""Tests of the activity of parameter tokens: computed by hand, and by removing tokens."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tokengrow.kernels.reference import ACTIVATIONS
from tokengrow.model.activity import measure_activity
from tokengrow.model.config import ModelConfig, ParameterTokens, Taus
from tokengrow.model.tokenformer import TokenFormer

Figures = dict[str, Tensor]


def test_two_tokens_by_hand() -> None:
    config = ModelConfig(
        vocab_size=2,
        context_length=2,
        layers=1,
        width=2,
        heads=1,
        tokens=ParameterTokens(query=2, key=1, value=1, output=1, ffn=1),
        tau=Taus(query=5.0),
        norm_eps=1e-12,
    )
    weights = TokenFormer(config).to_weights()
    weights["embedding.weight"] = torch.tensor([[3.0, 1.0], [0.0, 7.0]])
    weights["blocks.0.attention.query.key_param_tokens"] = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    weights["blocks.0.attention.query.value_param_tokens"] = torch.tensor([[1.0, 1.0], [0.5, 0.0]])
    query = measure_activity(config, weights, torch.tensor([[0, 1]]))[0, "query"]
    # The norm turns the embeddings into (1, -1) and (-1, 1). The scores are (3, 4) and (-3, -4), of
    # norm 5, which is tau. So the weights are GELU(3) = 2.9959503 and GELU(4) = 3.9998733, then
    # GELU(-3) = -0.0040497 and GELU(-4) = -0.0001267.
    first = (2.9959503**2 + 0.0040497**2) / 2 * 2.0  # ‖v‖² = 2
    second = (3.9998733**2 + 0.0001267**2) / 2 * 0.25
    assert query.contribution.tolist() == pytest.approx([first, second], rel=1e-6)
    assert query.share.tolist() == pytest.approx([9 / 25, 16 / 25], rel=1e-6)
    assert query.square.tolist() == pytest.approx([9.0, 16.0], rel=1e-6)


@pytest.fixture(params=ACTIVATIONS)
def model(
    request: pytest.FixtureRequest, published_config: ModelConfig, published_weights: Figures
) -> TokenFormer:
    """Return published model A with each activation."""
    config = replace(published_config, activation=request.param)
    return TokenFormer.from_weights(config, published_weights)


def test_contribution_equals_the_effect_of_removing_a_token(
    model: TokenFormer, published_figures: Figures
) -> None:
    ids, layer, outputs = published_figures["input_ids"], model.blocks[1].ffn, list[Tensor]()
    actual = measure_activity(model.config, model.to_weights(), ids)[1, "ffn"].contribution
    layer.register_forward_hook(lambda *call: outputs.append(call[2]))
    values = layer.value_param_tokens
    with torch.no_grad():
        model(ids)
        for token in range(6):
            value, values[token] = values[token].clone(), 0.0  # keeps its weight, adds nothing
            model(ids)
            values[token] = value
    added = torch.stack([(outputs[0] - without).square().sum(-1).mean() for without in outputs[1:]])
    torch.testing.assert_close(actual[:6].float(), added, rtol=1e-4, atol=1e-6)


def test_shares_of_a_layer_sum_to_one(model: TokenFormer, published_figures: Figures) -> None:
    ids = published_figures["input_ids"]
    for activity in measure_activity(model.config, model.to_weights(), ids).values():
        assert activity.share.sum().item() == pytest.approx(1, abs=1e-5)
        assert bool((activity.share >= 0).all())


def test_later_layers_read_outputs_of_earlier_ones(
    published_model: TokenFormer, published_figures: Figures
) -> None:
    ids, inputs = published_figures["input_ids"], list[Tensor]()
    layer = published_model.blocks[2].ffn
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        published_model(ids)
        scores = torch.nn.functional.linear(inputs[0], layer.key_param_tokens)
    actual = measure_activity(published_model.config, published_model.to_weights(), ids)
    expected = scores.square().flatten(0, 1).mean(0).double()
    torch.testing.assert_close(actual[2, "ffn"].square, expected, rtol=1e-4, atol=1e-9)


def test_half_precision_weights_are_computed_in_float32(
    published_model: TokenFormer, published_figures: Figures
) -> None:
    weights = {name: w.bfloat16() for name, w in published_model.to_weights().items()}
    wide = {name: w.float() for name, w in weights.items()}
    ids = published_figures["input_ids"]
    actual, expected = (measure_activity(published_model.config, w, ids) for w in (weights, wide))
    for layer, activity in expected.items():
        assert torch.equal(actual[layer].contribution, activity.contribution)
