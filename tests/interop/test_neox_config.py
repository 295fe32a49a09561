"""Model keys of a GPT-NeoX YAML: the model that they define, and unsupported values."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tokengrow.errors import UserError
from tokengrow.interop.neox_config import NeoxConfig, read_neox_yaml
from tokengrow.model.config import ModelConfig, ParameterTokens, Taus
from tokengrow.model.presets import PRESETS

PUBLISHED_YAML = Path(__file__).parents[1] / "golden" / "A_tiny_init" / "config.json"
"""Config of model A in the published code; JSON is YAML."""

WriteYaml = Callable[..., Path]


@pytest.fixture
def write_yaml(tmp_path: Path) -> WriteYaml:
    """`write_yaml(**changes)`: path of the published config with changed keys; None removes one."""

    def write(**changes: Any) -> Path:
        values = json.loads(PUBLISHED_YAML.read_text()) | changes
        path = tmp_path / "a.yml"
        path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
        return path

    return write


def read_config(path: Path) -> NeoxConfig:
    return NeoxConfig.from_values(read_neox_yaml(path), path)


def config_error(path: Path) -> str:
    """Return the error message of a YAML."""
    with pytest.raises(UserError) as error:
        read_config(path)
    return str(error.value)


class TestModel:
    def test_published_keys_give_the_published_model(self, published_config: ModelConfig) -> None:
        assert read_config(PUBLISHED_YAML).to_model(vocab_size=512) == published_config

    @pytest.mark.parametrize("name", PRESETS)
    def test_published_sizes_equal_their_presets(self, write_yaml: WriteYaml, name: str) -> None:
        layers, width, heads, n, n_ffn, context = PRESETS[name]
        path = write_yaml(
            num_layers=layers,
            hidden_size=width,
            num_attention_heads=heads,
            qkv_slot_num=n,
            proj_slot_num=n,
            ffn_slot_num=n_ffn,
            seq_length=context,
            attention_config=[[["tokenformer"], layers]],
        )
        assert read_config(path).to_model(vocab_size=50304) == ModelConfig.preset(name)

    def test_hyphens_in_keys_become_underscores(self, tmp_path: Path) -> None:
        values = json.loads(PUBLISHED_YAML.read_text())
        path = tmp_path / "a.yml"
        path.write_text(yaml.safe_dump({k.replace("_", "-"): v for k, v in values.items()}))
        assert read_config(path) == read_config(PUBLISHED_YAML)

    def test_number_that_yaml_reads_as_text_is_converted(self, tmp_path: Path) -> None:
        path = tmp_path / "a.yml"
        path.write_text(f"{PUBLISHED_YAML.read_text().rstrip()[:-1]}, layernorm_epsilon: 1e-6}}")
        assert (
            read_config(path).to_model(9).norm_eps
            == read_config(path).to_model(9).final_norm_eps
            == 1e-6
        )

    def test_absent_keys_have_the_defaults_of_gpt_neox(self, write_yaml: WriteYaml) -> None:
        absent = dict.fromkeys(
            ("rotary_pct", "norm_activation_type", "hidden_dropout", "model_parallel_size")
        )
        model = read_config(write_yaml(**absent)).to_model(9)
        assert model.rotary_channels == model.head_dim, "rotary_pct is 1"
        assert model.activation == "l2_norm_gelu"

    def test_context_length_is_seq_length(self, write_yaml: WriteYaml) -> None:
        assert read_config(write_yaml(max_position_embeddings=999)).to_model(9).context_length == 32

    @pytest.mark.parametrize(
        "kinds",
        [
            [[["tokenformer"], 3]],
            [[["tokenformer"], "all"]],
            [[["tokenformer"] * 3, "all"]],
            [[["tokenformer"] * 3, 1]],
            [[["tokenformer"], 1], [["tokenformer"], 2]],
            [[["tokenformer"] * 2, 1], [["tokenformer"], 1], [["flash"], 0]],
            [[["flash"], 1], [["tokenformer"], "all"]],  # GPT-NeoX reads it like this
            ["tokenformer"] * 3,
        ],
    )
    def test_every_notation_for_tokenformer_layers_is_read(
        self, write_yaml: WriteYaml, kinds: list[Any]
    ) -> None:
        assert read_config(write_yaml(attention_config=kinds)).num_layers == 3

    @pytest.mark.parametrize(
        ("key", "value"),
        [("init_method", "small_init"), ("output_layer_init_method", None), ("init_method_std", 1)],
    )
    def test_other_initialisations_become_balanced(
        self, write_yaml: WriteYaml, key: str, value: Any
    ) -> None:
        assert read_config(write_yaml(**{key: value})).to_model(9).init == "balanced"


class TestInvalidValues:
    @pytest.mark.parametrize(
        ("key", "value", "supported"),
        [
            ("pos_emb", "alibi", '"rotary"'),
            ("norm", "rmsnorm", '"layernorm_nonparam"'),
            ("final_norm", "rmsnorm", '"layernorm"'),
            ("no_weight_tying", True, "false"),
            ("gpt_j_residual", True, "false"),
            ("use_bias_in_attn_linear", True, "false"),
            ("norm_activation_type", "relu", '"l2_norm_gelu" or "gelu_l2_norm" or "softmax"'),
            ("attention_config", [[["flash"], 3]], '[[["tokenformer"], 3]]'),
            *(
                ("attention_config", kinds, '[[["tokenformer"], 3]]')
                for kinds in (
                    [[["tokenformer"], 2]],
                    [[["tokenformer"], 1], [["tokenformer"], 1]],
                    [[["tokenformer"], 10**12]],
                    [[["tokenformer"], 2], [["flash"], 1]],
                    [[["tokenformer", "flash"], 1], [["tokenformer"], 1]],
                    [[["tokenformer"] * 2, "all"]],
                    [[[], "all"]],
                    [["tokenformer", 3]],
                    [[["tokenformer"], "three"]],
                    [[["tokenformer"]]],
                    ["tokenformer", [["tokenformer"], 2]],
                    ["tokenformer"] * 2,
                )
            ),
            ("sliding_window_width", 16, "null"),
            ("hidden_dropout", 0.1, "0.0"),
            ("attention_dropout", 0.1, "0.0"),
            ("model_parallel_size", 2, "1"),
            ("pipe_parallel_size", 2, "0 or 1"),
        ],
    )
    def test_unsupported_value_is_named_with_the_valid_ones(
        self, write_yaml: WriteYaml, key: str, value: Any, supported: str
    ) -> None:
        message = config_error(path := write_yaml(**{key: value}))
        assert message == f"{path}: {key} must be {supported}, got {json.dumps(value)}."

    @pytest.mark.parametrize("key", ["pos_emb", "norm", "final_norm"])
    def test_unsupported_default_of_an_absent_key_is_named(
        self, write_yaml: WriteYaml, key: str
    ) -> None:
        message = config_error(write_yaml(**{key: None}))
        assert key in message and "(GPT-NeoX's default)" in message

    def test_missing_attention_config_is_an_error(self, write_yaml: WriteYaml) -> None:
        for absent in (None, []):
            message = config_error(write_yaml(attention_config=absent))
            assert "attention_config is missing, which is plain attention in GPT-NeoX" in message
            assert message.endswith('. Give [[["tokenformer"], 3]].')

    def test_error_names_every_invalid_value(self, write_yaml: WriteYaml) -> None:
        message = config_error(write_yaml(pos_emb="alibi", norm="rmsnorm", num_layers=0))
        assert all(key in message for key in ("pos_emb", "norm", "num_layers"))

    def test_error_names_every_missing_key(self, write_yaml: WriteYaml) -> None:
        missing = ("num_layers", "hidden_size", "num_attention_heads", "qkv_slot_num")
        message = config_error(
            write_yaml(**dict.fromkeys((*missing, "proj_slot_num", "seq_length")))
        )
        assert f"has no {', '.join(missing)}, proj_slot_num, seq_length" in message

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"num_attention_heads": 5},
                "hidden_size must be a multiple of num_attention_heads (5), got 64",
            ),
            ({"rotary_pct": 0.2}, "channels of a head, got 0.2"),  # 3 of 16 channels
            ({"rotary_pct": 1.5}, "channels of a head, got 1.5"),
            ({"rotary_emb_base": 0}, "rotary_emb_base must be positive, got 0.0"),
            ({"layernorm_epsilon": -1e-5}, "layernorm_epsilon must be positive, got -1e-05"),
            ({"ffn_slot_num": 0}, "ffn_slot_num must be at least 1, got 0"),
            ({"ffn_slot_num": "many"}, "ffn_slot_num"),
            ({"no_weight_tying": "perhaps"}, "no_weight_tying"),
        ],
    )
    def test_error_names_an_invalid_size(
        self, write_yaml: WriteYaml, changes: dict[str, Any], message: str
    ) -> None:
        assert message in config_error(write_yaml(**changes))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("a: b: c", "line 1: not valid YAML"),
            ("num_layers: 3\nnorm: [", "line 2: not valid YAML"),
            ("- 3", "has no keys"),
            ("", "has no keys"),
            ("num-layers: 3\nnum_layers: 3", "has num_layers twice"),
        ],
    )
    def test_invalid_file_is_an_error(self, tmp_path: Path, content: str, message: str) -> None:
        path = tmp_path / "a.yml"
        path.write_text(content)
        assert message in config_error(path)

    def test_binary_file_is_an_error(self, tmp_path: Path) -> None:
        path = tmp_path / "a.yml"
        path.write_bytes(b"\xff\xfe\x00")
        assert "not valid YAML" in config_error(path)

    def test_path_that_is_not_a_file_is_an_error(self, tmp_path: Path) -> None:
        assert "does not exist" in config_error(tmp_path / "nowhere.yml")
        assert "is a directory" in config_error(tmp_path)


class TestFromModel:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"init": "balanced"},
            {"activation": "softmax"},
            {"rotary_channels": 0},
            {"rotary_channels": 16},
            {"rotary_base": 500_000.0},
            {"norm_eps": 1e-6, "final_norm_eps": 1e-6},
        ],
    )
    def test_keys_of_a_model_give_the_same_model(
        self, published_config: ModelConfig, tmp_path: Path, changes: dict[str, Any]
    ) -> None:
        model = replace(published_config, **changes)
        path = tmp_path / "config.yml"
        path.write_text(yaml.safe_dump(NeoxConfig.from_model(model).to_dict()))
        assert read_config(path).to_model(model.vocab_size) == model

    def test_every_number_of_rotary_channels_is_expressible(self) -> None:
        tokens = ParameterTokens(query=2, key=2, value=2, output=2, ffn=2)
        sizes = {"vocab_size": 9, "context_length": 4, "layers": 1, "heads": 1, "tokens": tokens}
        for width in range(1, 200):
            for channels in range(0, width + 1, 2):
                model = ModelConfig(width=width, rotary_channels=channels, **sizes)
                assert NeoxConfig.from_model(model).rotary_channels == channels

    @pytest.mark.parametrize(
        ("changes", "key"),
        [
            ({"tau": Taus(ffn=9.0)}, "model.tau.ffn (9.0): it computes sqrt(160)"),
            ({"tau": Taus(output=math.sqrt(40) * (1 + 1e-10))}, "model.tau.output"),
            (
                {"tokens": ParameterTokens(query=48, key=47, value=48, output=40, ffn=9)},
                "model.tokens",
            ),
            ({"head_dim": 8}, "model.head_dim (8)"),
            ({"norm_eps": 1e-6}, "model.norm_eps (1e-06)"),
            ({"rotary_base": 10000.5}, "model.rotary_base (10000.5)"),
        ],
    )
    def test_error_names_inexpressible_values(
        self, published_config: ModelConfig, changes: dict[str, Any], key: str
    ) -> None:
        model = replace(published_config, **{"tau": Taus(), **changes})
        with pytest.raises(UserError, match="cannot express") as error:
            NeoxConfig.from_model(model)
        assert key in str(error.value)
