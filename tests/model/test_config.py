"""Tests of model configs: derived sizes, counts and refused values."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokengrow.errors import UserError
from tokengrow.model.config import ROLES, ModelConfig, ParameterTokens, Taus
from tokengrow.model.presets import PRESETS
from tokengrow.model.tokenformer import TokenFormer

COUNTS = json.loads((Path(__file__).parents[1] / "golden" / "G_param_counts.json").read_text())
OPENWEBTEXT2 = "incremental_scaling_openwebtext2"
OFFICIAL = {
    "tokenformer/150M_train_pile.yml": "150m",
    "tokenformer/450M_train_pile.yml": "450m",
    "tokenformer/900M_train_pile.yml": "900m",
    "tokenformer/1-5B_train_pile.yml": "1.5b",
    f"{OPENWEBTEXT2}/354M_train_openwebtext2_basemodel.yml": "owt2-354m",
    f"{OPENWEBTEXT2}/354M_to_757M_train_openwebtext2_60k.yml": "owt2-757m",
    f"{OPENWEBTEXT2}/354M_to_757M_train_openwebtext2_120k.yml": "owt2-757m",
}


def config(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 11,
        "context_length": 16,
        "layers": 2,
        "width": 8,
        "heads": 2,
        "tokens": ParameterTokens(query=3, key=4, value=5, output=6, ffn=7),
    }
    return ModelConfig(**{**sizes, **changes})


def built_parameters(sizes: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in TokenFormer(sizes).parameters())


def test_every_official_model_has_a_preset() -> None:
    assert set(OFFICIAL) == set(COUNTS["models"])


@pytest.mark.parametrize("official", OFFICIAL)
def test_preset_has_the_published_sizes_and_count(official: str) -> None:
    preset, published = ModelConfig.preset(OFFICIAL[official]), COUNTS["models"][official]
    assert preset.num_parameters() == published["total"]
    assert preset.vocab_size == published["padded_vocab_size"]
    assert preset.layers == published["num_layers"]
    assert preset.width == published["hidden_size"]
    assert preset.heads == published["num_attention_heads"]
    assert preset.tokens.query == preset.tokens.key == published["qkv_slot_num"]
    assert preset.tokens.output == published["proj_slot_num"]
    assert preset.tokens.ffn == published["ffn_slot_num"]


@pytest.mark.parametrize("official", OFFICIAL)
def test_preset_builds_the_published_tensors(official: str) -> None:
    published = COUNTS["models"][official]
    with torch.device("meta"):
        model = TokenFormer(ModelConfig.preset(OFFICIAL[official]))
    assert len(model.state_dict()) == published["n_tensors"]
    assert sum(parameter.numel() for parameter in model.parameters()) == published["total"]


@pytest.mark.parametrize(
    ("name", "millions"), [("paper-124m", 124), ("paper-354m", 354), ("paper-757m", 757)]
)
def test_presets_of_the_paper_have_the_sizes_of_their_names(name: str, millions: int) -> None:
    assert ModelConfig.preset(name).num_parameters() / 1e6 == pytest.approx(millions, rel=0.01)


def test_presets_use_the_published_initialisation() -> None:
    for name in PRESETS:
        preset = ModelConfig.preset(name)
        assert preset.init == "published"
        assert preset.activation == "l2_norm_gelu"
        assert preset.tau == Taus.default(preset.tokens)


def test_unknown_preset_is_refused_with_the_valid_names() -> None:
    with pytest.raises(
        UserError, match=r"model\.preset must be one of 150m, 450m, 900m,.* got '160m'"
    ):
        ModelConfig.preset("160m")


def test_parameter_count_by_hand() -> None:
    # Embedding 11 * 8 = 88; two blocks of (3 + 4 + 5 + 6 + 7) * (8 + 8) = 400; final norm 16.
    assert config().num_parameters() == 88 + 800 + 16
    # With head_dim 5 the inner dim is 10, and a block has (3 + 4 + 5 + 6) * 18 + 7 * 16 = 436.
    assert config(head_dim=5).num_parameters() == 88 + 2 * 436 + 16


@settings(max_examples=25, deadline=None)
@given(
    vocab=st.integers(1, 40),
    layers=st.integers(1, 4),
    width=st.integers(1, 24),
    heads=st.integers(1, 5),
    head_dim=st.integers(1, 9),
    tokens=st.tuples(*[st.integers(1, 20)] * len(ROLES)),
)
def test_parameter_count_equals_that_of_a_built_model(
    vocab: int, layers: int, width: int, heads: int, head_dim: int, tokens: tuple[int, ...]
) -> None:
    sizes = config(
        vocab_size=vocab,
        layers=layers,
        width=width,
        heads=heads,
        head_dim=head_dim,
        tokens=ParameterTokens(**dict(zip(ROLES, tokens, strict=True))),
    )
    assert sizes.num_parameters() == built_parameters(sizes)


def test_flops_by_hand() -> None:
    # 6 P + 6 L T H C with P = 904, L = 2, H C = 8.
    assert config().flops_per_token() == 6 * 904 + 6 * 2 * 16 * 8
    assert config().flops_per_token(1000) == 6 * 904 + 6 * 2 * 1000 * 8
    assert config().flops_per_token(0) == 6 * 904


def test_head_dim_rotary_channels_and_tau_are_derived() -> None:
    sizes = config(width=128, heads=2)
    assert sizes.head_dim == 64
    assert sizes.inner_dim == 128
    assert sizes.rotary_channels == 16
    assert sizes.tau.query == math.sqrt(3)
    assert sizes.tau.ffn == math.sqrt(7)


def test_rotated_channels_are_rounded_down_to_even() -> None:
    assert [config(head_dim=c).rotary_channels for c in (7, 8, 12, 16, 20)] == [0, 2, 2, 4, 4]


def test_given_values_are_not_derived() -> None:
    sizes = config(head_dim=10, rotary_channels=6, tau=Taus(query=1.5))
    assert (sizes.head_dim, sizes.inner_dim, sizes.rotary_channels) == (10, 20, 6)
    assert (sizes.tau.query, sizes.tau.key) == (1.5, 2.0)


def test_each_role_has_its_shape() -> None:
    sizes = config(head_dim=5)  # inner dim 10, width 8
    shapes = [(3, 8, 10), (4, 8, 10), (5, 8, 10), (6, 10, 8), (7, 8, 8)]
    assert [sizes.role_shape(role) for role in ROLES] == shapes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "model.vocab_size must be at least 1"),
        ({"context_length": 0}, "model.context_length must be at least 1"),
        ({"layers": 0}, "model.layers must be at least 1"),
        ({"width": 0}, "model.width must be at least 1"),
        ({"heads": 0}, "model.heads must be at least 1"),
        ({"heads": -2}, "model.heads must be at least 1"),
        ({"heads": 3}, r"model.width must be a multiple of model.heads \(3\), got 8"),
        ({"head_dim": -1}, "model.head_dim must be at least 1, got -1"),
        (
            {"tokens": ParameterTokens(query=3, key=0, value=5, output=6, ffn=7)},
            "model.tokens.key must be at least 1, got 0",
        ),
        ({"activation": "relu"}, "model.activation must be one of l2_norm_gelu, .* got 'relu'"),
        ({"init": "zeros"}, "model.init must be one of balanced, published, got 'zeros'"),
        ({"rotary_channels": 6}, r"model.rotary_channels .* at most head_dim \(4\), got 6"),
        ({"rotary_channels": 3}, "model.rotary_channels must be even .* got 3"),
        ({"rotary_channels": -2}, "model.rotary_channels must be even .* got -2"),
        ({"tau": Taus(value=-1.0)}, "model.tau.value must be positive"),
        ({"tau": Taus(ffn=math.nan)}, "model.tau.ffn must be positive"),
    ],
)
def test_invalid_sizes_are_refused_with_their_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**changes)


def test_differences_have_dotted_keys_and_both_values() -> None:
    other = config(layers=3, tokens=ParameterTokens(query=3, key=9, value=5, output=6, ffn=7))
    assert config().differences(other) == {
        "layers": (2, 3),
        "tokens.key": (4, 9),
        "tau.key": (2.0, 3.0),
    }
    assert config().differences(config()) == {}


def test_plain_dict_contains_every_derived_size() -> None:
    values = config().to_dict()
    assert (values["head_dim"], values["rotary_channels"]) == (4, 0)
    assert values["tau"]["key"] == 2.0
    rebuilt = ModelConfig(
        **{**values, "tokens": ParameterTokens(**values["tokens"]), "tau": Taus(**values["tau"])}
    )
    assert rebuilt == config()
