"""The GPT-NeoX YAML: the model that it describes, and what of it tokengrow does not have."""

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
from tokengrow.model.config import ModelConfig, Taus, Tokens
from tokengrow.model.presets import PRESETS

OFFICIAL = Path(__file__).parents[1] / "golden" / "A_tiny_init" / "config.json"
"""The configuration of model A in the published code; JSON is YAML."""

Written = Callable[..., Path]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """`written(**changes)`: the official configuration with these keys changed; None takes one
    out."""

    def write(**changes: Any) -> Path:
        values = json.loads(OFFICIAL.read_text()) | changes
        path = tmp_path / "a.yml"
        path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
        return path

    return write


def keys_of(path: Path) -> NeoxConfig:
    return NeoxConfig.of(read_neox_yaml(path), path)


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        keys_of(path)
    return str(error.value)


class TestModel:
    def test_the_official_keys_are_the_published_model(self, published_config: ModelConfig) -> None:
        assert keys_of(OFFICIAL).model(vocab_size=512) == published_config

    @pytest.mark.parametrize("name", PRESETS)
    def test_a_published_size_is_its_preset(self, written: Written, name: str) -> None:
        layers, width, heads, n, n_ffn, context = PRESETS[name]
        path = written(
            num_layers=layers,
            hidden_size=width,
            num_attention_heads=heads,
            qkv_slot_num=n,
            proj_slot_num=n,
            ffn_slot_num=n_ffn,
            seq_length=context,
            attention_config=[[["tokenformer"], layers]],
        )
        assert keys_of(path).model(vocab_size=50304) == ModelConfig.preset(name)

    def test_hyphens_are_underscores(self, tmp_path: Path) -> None:
        values = json.loads(OFFICIAL.read_text())
        path = tmp_path / "a.yml"
        path.write_text(yaml.safe_dump({k.replace("_", "-"): v for k, v in values.items()}))
        assert keys_of(path) == keys_of(OFFICIAL)

    def test_a_number_may_be_what_yaml_takes_for_text(self, tmp_path: Path) -> None:
        path = tmp_path / "a.yml"
        path.write_text(f"{OFFICIAL.read_text().rstrip()[:-1]}, layernorm_epsilon: 1e-6}}")
        assert keys_of(path).model(9).norm_eps == keys_of(path).model(9).final_norm_eps == 1e-6

    def test_an_absent_key_has_the_default_of_gpt_neox(self, written: Written) -> None:
        absent = dict.fromkeys(
            ("rotary_pct", "norm_activation_type", "hidden_dropout", "model_parallel_size")
        )
        model = keys_of(written(**absent)).model(9)
        assert model.rotary_channels == model.head_dim, "rotary_pct is 1"
        assert model.activation == "l2_norm_gelu"

    def test_the_context_is_the_length_of_a_training_sequence(self, written: Written) -> None:
        assert keys_of(written(max_position_embeddings=999)).model(9).context_length == 32

    @pytest.mark.parametrize(
        "kinds",
        [
            [[["tokenformer"], 3]],
            [[["tokenformer"], "all"]],
            [[["tokenformer"] * 3, "all"]],
            [[["tokenformer"] * 3, 1]],
            [[["tokenformer"], 1], [["tokenformer"], 2]],
            [[["tokenformer"] * 2, 1], [["tokenformer"], 1], [["flash"], 0]],
            [[["flash"], 1], [["tokenformer"], "all"]],  # which GPT-NeoX reads so
            ["tokenformer"] * 3,
        ],
    )
    def test_every_way_to_say_that_all_layers_are_tokenformers(
        self, written: Written, kinds: list[Any]
    ) -> None:
        assert keys_of(written(attention_config=kinds)).num_layers == 3

    @pytest.mark.parametrize(
        ("key", "value"),
        [("init_method", "small_init"), ("output_layer_init_method", None), ("init_method_std", 1)],
    )
    def test_weights_that_start_otherwise_do_not_start_as_published(
        self, written: Written, key: str, value: Any
    ) -> None:
        assert keys_of(written(**{key: value})).model(9).init == "balanced"


class TestRefusal:
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
    def test_another_architecture_is_named_with_what_there_is(
        self, written: Written, key: str, value: Any, supported: str
    ) -> None:
        said = refused(path := written(**{key: value}))
        assert said.startswith(f"{path}: {key} is {json.dumps(value)}")
        assert said.endswith(f"and tokengrow has {supported} alone")

    @pytest.mark.parametrize("key", ["pos_emb", "norm", "final_norm"])
    def test_an_absent_key_whose_default_is_another_architecture_is_named(
        self, written: Written, key: str
    ) -> None:
        said = refused(written(**{key: None}))
        assert key in said and "(GPT-NeoX's default)" in said

    def test_without_the_kind_of_its_layers_it_is_another_model(self, written: Written) -> None:
        for absent in (None, []):
            said = refused(written(attention_config=absent))
            assert "attention_config is missing, which is plain attention in GPT-NeoX" in said
            assert said.endswith(': give [[["tokenformer"], 3]]')

    def test_all_that_is_wrong_is_named_at_once(self, written: Written) -> None:
        said = refused(written(pos_emb="alibi", norm="rmsnorm", num_layers=0))
        assert all(key in said for key in ("pos_emb", "norm", "num_layers"))

    def test_all_missing_keys_are_named_at_once(self, written: Written) -> None:
        missing = ("num_layers", "hidden_size", "num_attention_heads", "qkv_slot_num")
        said = refused(written(**dict.fromkeys((*missing, "proj_slot_num", "seq_length"))))
        assert f"has no {', '.join(missing)}, proj_slot_num, seq_length" in said

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"num_attention_heads": 5}, "num_attention_heads (5) does not divide hidden_size"),
            ({"rotary_pct": 0.2}, "rotary_pct is 0.2"),  # 3 of 16 channels
            ({"rotary_pct": 1.5}, "rotary_pct is 1.5"),
            ({"rotary_emb_base": 0}, "rotary_emb_base must be positive, not 0.0"),
            ({"layernorm_epsilon": -1e-5}, "layernorm_epsilon must be positive, not -1e-05"),
            ({"ffn_slot_num": 0}, "ffn_slot_num must be at least 1, not 0"),
            ({"ffn_slot_num": "many"}, "ffn_slot_num"),
            ({"no_weight_tying": "perhaps"}, "no_weight_tying"),
        ],
    )
    def test_a_size_that_makes_no_model_is_named(
        self, written: Written, changes: dict[str, Any], said: str
    ) -> None:
        assert said in refused(written(**changes))

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ("a: b: c", "line 1: this is not YAML"),
            ("num_layers: 3\nnorm: [", "line 2: this is not YAML"),
            ("- 3", "holds no keys"),
            ("", "holds no keys"),
            ("num-layers: 3\nnum_layers: 3", "gives num_layers twice"),
        ],
    )
    def test_a_file_that_is_no_configuration_is_named(
        self, tmp_path: Path, content: str, said: str
    ) -> None:
        path = tmp_path / "a.yml"
        path.write_text(content)
        assert said in refused(path)

    def test_bytes_that_are_no_text_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "a.yml"
        path.write_bytes(b"\xff\xfe\x00")
        assert "this is not YAML" in refused(path)

    def test_a_path_that_is_no_file_is_refused(self, tmp_path: Path) -> None:
        assert "does not exist" in refused(tmp_path / "nowhere.yml")
        assert "is a folder" in refused(tmp_path)


class TestDescribing:
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
    def test_the_keys_of_a_model_are_read_back_as_the_model(
        self, published_config: ModelConfig, tmp_path: Path, changes: dict[str, Any]
    ) -> None:
        model = replace(published_config, **changes)
        path = tmp_path / "config.yml"
        path.write_text(yaml.safe_dump(NeoxConfig.describing(model).to_dict()))
        assert keys_of(path).model(model.vocab_size) == model

    def test_every_number_of_rotated_channels_has_its_share(self) -> None:
        tokens = Tokens(query=2, key=2, value=2, output=2, ffn=2)
        sizes = {"vocab_size": 9, "context_length": 4, "layers": 1, "heads": 1, "tokens": tokens}
        for width in range(1, 200):
            for channels in range(0, width + 1, 2):
                model = ModelConfig(width=width, rotary_channels=channels, **sizes)
                assert NeoxConfig.describing(model).rotary_channels == channels

    @pytest.mark.parametrize(
        ("changes", "key"),
        [
            ({"tau": Taus(ffn=9.0)}, "model.tau.ffn (9.0): it computes sqrt(160)"),
            ({"tau": Taus(output=math.sqrt(40) * (1 + 1e-10))}, "model.tau.output"),
            ({"tokens": Tokens(query=48, key=47, value=48, output=40, ffn=9)}, "model.tokens"),
            ({"head_dim": 8}, "model.head_dim (8)"),
            ({"norm_eps": 1e-6}, "model.norm_eps (1e-06)"),
            ({"rotary_base": 10000.5}, "model.rotary_base (10000.5)"),
        ],
    )
    def test_what_the_published_code_has_no_word_for_is_named(
        self, published_config: ModelConfig, changes: dict[str, Any], key: str
    ) -> None:
        model = replace(published_config, **{"tau": Taus(), **changes})
        with pytest.raises(UserError, match="no word for") as error:
            NeoxConfig.describing(model)
        assert key in str(error.value)
