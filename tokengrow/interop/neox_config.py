"""Model keys of the GPT-NeoX YAML of the published code."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

import yaml

from tokengrow.errors import UserError
from tokengrow.kernels.reference import Activation
from tokengrow.model.config import ROLES, ModelConfig, ParameterTokens, Taus
from tokengrow.parsing import join_key, parse_dataclass

T = TypeVar("T")

Values = dict[str, Any]

PUBLISHED_INIT: Values = {
    "init_method": "normal",
    "init_method_std": 0.02,
    "output_layer_init_method": "wang_init",
}
"""Keys of the published code for init=published."""

SUPPORTED_VALUES: dict[str, tuple[Any, ...]] = {
    "norm_activation_type": ("l2_norm_gelu", "gelu_l2_norm", "softmax"),
    "pos_emb": ("rotary",),
    "norm": ("layernorm_nonparam",),
    "final_norm": ("layernorm",),
    "no_weight_tying": (False,),
    "gpt_j_residual": (False,),
    "use_bias_in_attn_linear": (False,),
    "sliding_window_width": (None,),
    "hidden_dropout": (0.0,),
    "attention_dropout": (0.0,),
    "model_parallel_size": (1,),
    "pipe_parallel_size": (0, 1),
}
"""Key to the values with which GPT-NeoX builds a model that tokengrow has."""

TAU_TOLERANCE = 1e-12
"""Largest relative difference between a tau and sqrt(N), which the published code computes."""


@dataclass(frozen=True, kw_only=True)
class NeoxConfig:
    """Keys that define the model.

    An absent key has GPT-NeoX's own default, with two exceptions. `attention_config` is required,
    because its default in GPT-NeoX is plain attention. `use_bias_in_attn_linear` is false, because
    the layers of a TokenFormer ignore it, although its default in GPT-NeoX is true.

    Raises:
        UserError: tokengrow does not have the model; the message names every such key.
    """

    num_layers: int
    """Number of layers L."""
    hidden_size: int
    """Model width D."""
    num_attention_heads: int
    """Number of heads H."""
    qkv_slot_num: int
    """Parameter tokens N of query, key and value."""
    proj_slot_num: int
    """Parameter tokens N of the output projection of attention."""
    ffn_slot_num: int
    """Parameter tokens N of the feed-forward layer."""
    seq_length: int
    """Context length T."""
    norm_activation_type: str = "l2_norm_gelu"
    """Pattention activation, from scores to weights."""
    attention_config: list[Any] = field(default_factory=list)
    """Type of every layer, as `[pattern, count]` pairs or as names; empty: absent."""
    pos_emb: str = "learned"
    """Position embedding."""
    rotary_pct: float = 1.0
    """Fraction of the channels of a head that is rotated."""
    rotary_emb_base: float = 10000.0
    """Base of the rotary frequencies."""
    norm: str = "layernorm"
    """Norm of the blocks."""
    final_norm: str | None = None
    """Norm after the last block."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of both norms."""
    no_weight_tying: bool = False
    """Whether the output head has its own weights."""
    gpt_j_residual: bool = False
    """Whether attention and feed-forward layer are parallel."""
    use_bias_in_attn_linear: bool = False
    """Whether projections have biases; those of a TokenFormer have none."""
    sliding_window_width: int | None = None
    """Window of attention in tokens; null: unlimited."""
    hidden_dropout: float = 0.0
    """Dropout of the residual stream."""
    attention_dropout: float = 0.0
    """Dropout of attention."""
    model_parallel_size: int = 1
    """Size of tensor parallelism."""
    pipe_parallel_size: int = 0
    """Size of pipeline parallelism; 0 and 1: none."""
    init_method: str = "normal"
    """Initialisation of the embedding and the key parameter tokens."""
    init_method_std: float = 0.02
    """Standard deviation of `init_method`."""
    output_layer_init_method: str = "scaled_normal"
    """Initialisation of the value parameter tokens."""

    def __post_init__(self) -> None:
        if problems := [*_unsupported_values(self), *_invalid_sizes(self)]:
            raise UserError(" ".join(problems))

    @property
    def head_dim(self) -> int:
        """Head dim C."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_channels(self) -> int:
        """Rotated channels of a head, rounded like in GPT-NeoX."""
        return int(self.head_dim * self.rotary_pct)

    @property
    def has_published_init(self) -> bool:
        """Whether new weights have the distribution of init=published."""
        return all(getattr(self, key) == value for key, value in PUBLISHED_INIT.items())

    @classmethod
    def from_values(cls, values: Mapping[str, Any], path: Path) -> "NeoxConfig":
        """Build the config from all values of a YAML.

        Args:
            values: result of `read_neox_yaml`; keys that are not model keys are ignored.
            path: path of the YAML, for error messages.

        Raises:
            UserError: keys are missing or have unsupported values; the message names all.
        """
        model_values, _ = split_keys(cls, values)
        if missing := [key for key in REQUIRED_KEYS if key not in model_values]:
            raise UserError(
                f"{path} has no {', '.join(missing)}. Give the GPT-NeoX YAML of a TokenFormer."
            )
        return parse_file_values(path, cls, model_values)

    @classmethod
    def from_model(cls, model: ModelConfig) -> "NeoxConfig":
        """Return the keys with which the published code builds a model.

        Raises:
            UserError: the published code cannot express the model; the message names all keys.
        """
        if problems := _inexpressible_values(model):
            raise UserError(
                f"The published code cannot express {'; '.join(problems)}. Use to=hf instead."
            )
        fraction = model.rotary_channels / model.head_dim
        if int(model.head_dim * fraction) != model.rotary_channels:  # both operations round down
            fraction = math.nextafter(fraction, math.inf)
        return cls(
            num_layers=model.layers,
            hidden_size=model.width,
            num_attention_heads=model.heads,
            qkv_slot_num=model.tokens.query,
            proj_slot_num=model.tokens.output,
            ffn_slot_num=model.tokens.ffn,
            seq_length=model.context_length,
            norm_activation_type=model.activation,
            attention_config=[[["tokenformer"], model.layers]],
            pos_emb="rotary",
            rotary_pct=fraction,
            rotary_emb_base=model.rotary_base,
            norm="layernorm_nonparam",
            final_norm="layernorm",
            layernorm_epsilon=model.norm_eps,
            **(PUBLISHED_INIT if model.init == "published" else {}),
        )

    def to_model(self, vocab_size: int) -> ModelConfig:
        """Return the config of the model that the published code builds from these keys.

        Args:
            vocab_size: V, which is not in the YAML.
        """
        qkv = self.qkv_slot_num
        return ModelConfig(
            vocab_size=vocab_size,
            context_length=self.seq_length,
            layers=self.num_layers,
            width=self.hidden_size,
            heads=self.num_attention_heads,
            tokens=ParameterTokens(
                query=qkv, key=qkv, value=qkv, output=self.proj_slot_num, ffn=self.ffn_slot_num
            ),
            activation=cast(Activation, self.norm_activation_type),
            rotary_channels=self.rotary_channels,
            rotary_base=self.rotary_emb_base,
            norm_eps=self.layernorm_epsilon,
            final_norm_eps=self.layernorm_epsilon,
            init="published" if self.has_published_init else "balanced",
        )

    def to_dict(self) -> Values:
        """Return the keys of a GPT-NeoX YAML with only this model."""
        values = asdict(self) | {
            "rotary_emb_base": int(self.rotary_emb_base),
            "max_position_embeddings": self.seq_length,
        }
        return {key: value for key, value in values.items() if value is not None}


REQUIRED_KEYS = [
    item.name
    for item in fields(NeoxConfig)
    if item.default is MISSING and item.default_factory is MISSING
]
"""Keys of sizes, which have no default."""


def read_neox_yaml(path: Path) -> Values:
    """Read a GPT-NeoX YAML or JSON file, with `_` for `-` in its keys.

    Raises:
        UserError: the file does not exist, is not a mapping, or has a key twice.
    """
    if not path.is_file():
        problem = "is a directory" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {problem}. Give the path of a GPT-NeoX YAML.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML. Give a GPT-NeoX YAML.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} has no keys. Give a GPT-NeoX YAML.")
    values: Values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name in values:
            raise UserError(f"{path} has {name} twice, with - and with _. Remove one of them.")
        values[name] = value
    return values


def split_keys(cls: type, values: Mapping[str, Any], where: str = "") -> tuple[Values, list[str]]:
    """Split a mapping into the values of the fields of a dataclass and all other keys.

    Null counts as absent, as in GPT-NeoX.

    Args:
        cls: a dataclass, whose fields may be dataclasses.
        values: the mapping.
        where: dotted prefix of its keys.

    Returns:
        Values by field, and the dotted keys without a field.
    """
    hints = get_type_hints(cls)
    known: Values = {}
    others: list[str] = []
    for name, value in values.items():
        key = join_key(where, str(name))
        if name not in hints:
            others.append(key)
        elif is_dataclass(hints[name]) and isinstance(value, Mapping):
            known[name], inner = split_keys(hints[name], value, key)
            others += inner
        elif value is not None:
            known[name] = value
    return known, others


def parse_file_values(path: Path, cls: type[T], values: Values) -> T:
    """Call `parse_dataclass`, and prefix its errors with the name of the file."""
    try:
        return parse_dataclass(cls, values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _unsupported_values(keys: NeoxConfig) -> Iterator[str]:
    """Yield an error for each key with which GPT-NeoX builds a model that tokengrow lacks."""
    for key, supported in SUPPORTED_VALUES.items():
        value = getattr(keys, key)
        if value not in supported:
            default = " (GPT-NeoX's default)" if value == getattr(NeoxConfig, key) else ""
            valid = " or ".join(json.dumps(each) for each in supported)
            yield f"{key} must be {valid}, got {json.dumps(value)}{default}."
    layer_types, valid = keys.attention_config, json.dumps([[["tokenformer"], keys.num_layers]])
    if not layer_types:
        yield f"attention_config is missing, which is plain attention in GPT-NeoX. Give {valid}."
    elif _expand_layer_types(layer_types, keys.num_layers) != ["tokenformer"] * keys.num_layers:
        yield f"attention_config must be {valid}, got {json.dumps(layer_types, default=str)}."


def _expand_layer_types(layer_types: list[Any], layers: int) -> list[Any]:
    """Return the type of every layer, as GPT-NeoX expands the list; empty for an invalid list."""
    if all(isinstance(layer_type, str) for layer_type in layer_types):
        return layer_types
    expanded: list[Any] = []
    for item in layer_types:
        match item:
            case [[_, *_] as pattern, "all"]:  # GPT-NeoX ignores the items before it
                return pattern * (layers // len(pattern)) if layers % len(pattern) == 0 else []
            case [[*pattern], int(count)]:
                expanded += pattern * min(count, layers + 1)  # a longer list is invalid anyway
            case _:
                return []
    return expanded


def _invalid_sizes(keys: NeoxConfig) -> Iterator[str]:
    """Yield an error for each size that no model can have."""
    too_small = [key for key in REQUIRED_KEYS if getattr(keys, key) < 1]
    yield from (f"{key} must be at least 1, got {getattr(keys, key)}." for key in too_small)
    for key in ("rotary_emb_base", "layernorm_epsilon"):
        if not (value := getattr(keys, key)) > 0:
            yield f"{key} must be positive, got {value}."
    if too_small:
        return
    heads, width = keys.num_attention_heads, keys.hidden_size
    if width % heads:
        yield f"hidden_size must be a multiple of num_attention_heads ({heads}), got {width}."
    elif not 0 <= keys.rotary_pct <= 1 or keys.rotary_channels % 2:
        yield (
            f"rotary_pct must rotate an even number of the {keys.head_dim} channels of a head, "
            f"got {keys.rotary_pct}."
        )


def _inexpressible_values(model: ModelConfig) -> list[str]:
    """Return the model keys that the published code cannot express, each with the reason."""
    problems = []
    tokens, default_tau = dict(model.tokens.items()), Taus.default(model.tokens)
    if model.inner_dim != model.width:
        problems.append(
            f"model.head_dim ({model.head_dim}): it computes width / heads, "
            f"{model.width} / {model.heads}"
        )
    if len({tokens["query"], tokens["key"], tokens["value"]}) > 1:
        problems.append(
            f"model.tokens.query, key and value ({tokens['query']}, {tokens['key']}, "
            f"{tokens['value']}): it has one number for the three"
        )
    for role in ROLES:
        tau, default = getattr(model.tau, role), getattr(default_tau, role)
        if not math.isclose(tau, default, rel_tol=TAU_TOLERANCE):
            problems.append(
                f"model.tau.{role} ({tau}): it computes sqrt({tokens[role]}) = {default}, which "
                "growth=gram reaches at once and growth=anneal during training"
            )
    if model.norm_eps != model.final_norm_eps:
        problems.append(
            f"model.norm_eps ({model.norm_eps}) and model.final_norm_eps "
            f"({model.final_norm_eps}): it has one epsilon for both"
        )
    if not model.rotary_base.is_integer():
        problems.append(f"model.rotary_base ({model.rotary_base}): it needs a whole number")
    return problems
