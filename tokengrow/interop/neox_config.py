"""The GPT-NeoX YAML of the published code: which of its keys say what the model is."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

import yaml

from tokengrow.errors import UserError
from tokengrow.kernels.reference import Activation
from tokengrow.model.config import ROLES, ModelConfig, Taus, Tokens
from tokengrow.parsing import join_key, parse_dataclass

T = TypeVar("T")

Values = dict[str, Any]

PUBLISHED_INIT: Values = {
    "init_method": "normal",
    "init_method_std": 0.02,
    "output_layer_init_method": "wang_init",
}
"""What the published code calls our init=published."""

SUPPORTED: dict[str, tuple[Any, ...]] = {
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
"""Key to the values with which GPT-NeoX builds the model that tokengrow has."""

TAU_PRECISION = 1e-12
"""How far a tau may be from sqrt(N), relatively, and still be what the published code computes."""


@dataclass(frozen=True, kw_only=True)
class NeoxConfig:
    """The keys that say what the model is.

    One that is absent has GPT-NeoX's own default, but for two: `attention_config` has to be given,
    since plain attention is its default there, and `use_bias_in_attn_linear` is true there, which
    the layers of a TokenFormer do not heed.

    Raises:
        UserError: a model that tokengrow does not have, naming every such key.
    """

    num_layers: int
    """L."""
    hidden_size: int
    """D."""
    num_attention_heads: int
    """H."""
    qkv_slot_num: int
    """N of query, key and value."""
    proj_slot_num: int
    """N of the output projection of attention."""
    ffn_slot_num: int
    """N of the feed-forward layer."""
    seq_length: int
    """T, the context length."""
    norm_activation_type: str = "l2_norm_gelu"
    """What turns scores into weights."""
    attention_config: list[Any] = field(default_factory=list)
    """The kind of every layer, as `[pattern, count]` pairs or by name; empty: it is absent."""
    pos_emb: str = "learned"
    """How positions enter."""
    rotary_pct: float = 1.0
    """Share of a head's channels that is rotated."""
    rotary_emb_base: float = 10000.0
    """Base of the rotary frequencies."""
    norm: str = "layernorm"
    """Norm in the blocks."""
    final_norm: str | None = None
    """Norm behind the last block."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of both."""
    no_weight_tying: bool = False
    """Whether the output head has weights of its own."""
    gpt_j_residual: bool = False
    """Whether attention and feed-forward layer stand side by side."""
    use_bias_in_attn_linear: bool = False
    """Whether projections have biases; a TokenFormer's never have."""
    sliding_window_width: int | None = None
    """How far attention looks back; null: to the start."""
    hidden_dropout: float = 0.0
    """Dropout of the residual stream."""
    attention_dropout: float = 0.0
    """Dropout of attention."""
    model_parallel_size: int = 1
    """Parts into which every tensor is cut."""
    pipe_parallel_size: int = 0
    """Parts into which the layers are cut; 0 and 1: they are not."""
    init_method: str = "normal"
    """How the embedding and the keys start."""
    init_method_std: float = 0.02
    """Their standard deviation."""
    output_layer_init_method: str = "scaled_normal"
    """How the values start."""

    def __post_init__(self) -> None:
        if wrong := [*_unsupported(self), *_impossible(self)]:
            raise UserError("; ".join(wrong))

    @property
    def head_dim(self) -> int:
        """C."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_channels(self) -> int:
        """Rotated channels of a head, rounded as GPT-NeoX rounds."""
        return int(self.head_dim * self.rotary_pct)

    @property
    def starts_as_published(self) -> bool:
        """Whether weights are born as our init=published draws them."""
        return all(getattr(self, key) == value for key, value in PUBLISHED_INIT.items())

    @classmethod
    def of(cls, values: Mapping[str, Any], path: Path) -> "NeoxConfig":
        """The model's keys among all of a YAML.

        Args:
            values: what `read_neox_yaml` gave; other keys are left alone.
            path: of the YAML, for error messages.

        Raises:
            UserError: keys that are missing or not supported, all of them named.
        """
        given, _ = divide(cls, values)
        if missing := [key for key in REQUIRED if key not in given]:
            raise UserError(
                f"{path} has no {', '.join(missing)}: give the GPT-NeoX YAML of a TokenFormer"
            )
        return typed_from(path, cls, given)

    @classmethod
    def describing(cls, model: ModelConfig) -> "NeoxConfig":
        """The keys with which the published code builds this model.

        Raises:
            UserError: it has no word for something in the model; all of it is named.
        """
        if wrong := _without_a_word(model):
            raise UserError(
                f"the published code has no word for {'; '.join(wrong)}: use to=hf, or keep it here"
            )
        share = model.rotary_channels / model.head_dim
        if int(model.head_dim * share) != model.rotary_channels:  # rounded down twice
            share = math.nextafter(share, math.inf)
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
            rotary_pct=share,
            rotary_emb_base=model.rotary_base,
            norm="layernorm_nonparam",
            final_norm="layernorm",
            layernorm_epsilon=model.norm_eps,
            **(PUBLISHED_INIT if model.init == "published" else {}),
        )

    def model(self, vocab_size: int) -> ModelConfig:
        """The model that the published code builds of these keys.

        Args:
            vocab_size: V, of which the YAML says nothing.
        """
        qkv = self.qkv_slot_num
        return ModelConfig(
            vocab_size=vocab_size,
            context_length=self.seq_length,
            layers=self.num_layers,
            width=self.hidden_size,
            heads=self.num_attention_heads,
            tokens=Tokens(
                query=qkv, key=qkv, value=qkv, output=self.proj_slot_num, ffn=self.ffn_slot_num
            ),
            activation=cast(Activation, self.norm_activation_type),
            rotary_channels=self.rotary_channels,
            rotary_base=self.rotary_emb_base,
            norm_eps=self.layernorm_epsilon,
            final_norm_eps=self.layernorm_epsilon,
            init="published" if self.starts_as_published else "balanced",
        )

    def to_dict(self) -> Values:
        """The keys as GPT-NeoX takes them, in a YAML of its own."""
        values = asdict(self) | {
            "rotary_emb_base": int(self.rotary_emb_base),
            "max_position_embeddings": self.seq_length,
        }
        return {key: value for key, value in values.items() if value is not None}


REQUIRED = [
    item.name
    for item in fields(NeoxConfig)
    if item.default is MISSING and item.default_factory is MISSING
]
"""The sizes without which there is no model."""


def read_neox_yaml(path: Path) -> Values:
    """Every key of a GPT-NeoX YAML, or of the JSON that it often is, with `_` for `-`.

    Raises:
        UserError: no such file, or not a mapping of keys, or a key that is given twice.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {what}: give the path of a GPT-NeoX YAML")
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: this is not YAML: give a GPT-NeoX YAML") from None
    if not isinstance(read, dict):
        raise UserError(f"{path} holds no keys: give a GPT-NeoX YAML")
    values: Values = {}
    for key, value in read.items():
        name = str(key).replace("-", "_")
        if name in values:
            raise UserError(f"{path} gives {name} twice, with - and with _: leave one of them")
        values[name] = value
    return values


def divide(cls: type, values: Mapping[str, Any], where: str = "") -> tuple[Values, list[str]]:
    """What a mapping says for the fields of a dataclass, and the dotted keys that have no field.

    Null says nothing, as in GPT-NeoX.
    """
    hints = get_type_hints(cls)
    given: Values = {}
    left: list[str] = []
    for name, value in values.items():
        key = join_key(where, str(name))
        if name not in hints:
            left.append(key)
        elif is_dataclass(hints[name]) and isinstance(value, Mapping):
            given[name], inner = divide(hints[name], value, key)
            left += inner
        elif value is not None:
            given[name] = value
    return given, left


def typed_from(path: Path, cls: type[T], values: Values) -> T:
    """Call `parse_dataclass`, and prefix its errors with the name of the file."""
    try:
        return parse_dataclass(cls, values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _unsupported(keys: NeoxConfig) -> Iterator[str]:
    """What GPT-NeoX would build otherwise than tokengrow, one clause for each key."""
    for key, supported in SUPPORTED.items():
        value = getattr(keys, key)
        if value not in supported:
            default = " (GPT-NeoX's default)" if value == getattr(NeoxConfig, key) else ""
            wanted = " or ".join(json.dumps(each) for each in supported)
            yield f"{key} is {json.dumps(value)}{default}, and tokengrow has {wanted} alone"
    kinds, wanted = keys.attention_config, json.dumps([[["tokenformer"], keys.num_layers]])
    if not kinds:
        yield f"attention_config is missing, which is plain attention in GPT-NeoX: give {wanted}"
    elif _every_kind(kinds, keys.num_layers) != ["tokenformer"] * keys.num_layers:
        found = json.dumps(kinds, default=str)
        yield f"attention_config is {found}, and tokengrow has {wanted} alone"


def _every_kind(kinds: list[Any], layers: int) -> list[Any]:
    """The kind of every layer, as GPT-NeoX expands the list; empty where it cannot."""
    if all(isinstance(kind, str) for kind in kinds):
        return kinds
    expanded: list[Any] = []
    for item in kinds:
        match item:
            case [[_, *_] as pattern, "all"]:  # and what stood before it is forgotten
                return pattern * (layers // len(pattern)) if layers % len(pattern) == 0 else []
            case [[*pattern], int(count)]:
                expanded += pattern * min(count, layers + 1)  # more of them are wrong anyway
            case _:
                return []
    return expanded


def _impossible(keys: NeoxConfig) -> Iterator[str]:
    """Sizes that make no model, one clause for each."""
    small = [key for key in REQUIRED if getattr(keys, key) < 1]
    yield from (f"{key} must be at least 1, not {getattr(keys, key)}" for key in small)
    for key in ("rotary_emb_base", "layernorm_epsilon"):
        if not (value := getattr(keys, key)) > 0:
            yield f"{key} must be positive, not {value}"
    if small:
        return
    heads, width = keys.num_attention_heads, keys.hidden_size
    if width % heads:
        yield f"num_attention_heads ({heads}) does not divide hidden_size ({width})"
    elif not 0 <= keys.rotary_pct <= 1 or keys.rotary_channels % 2:
        yield (
            f"rotary_pct is {keys.rotary_pct}: it must rotate an even number of the "
            f"{keys.head_dim} channels of a head"
        )


def _without_a_word(model: ModelConfig) -> list[str]:
    """What keeps the published code from building a model, by our keys."""
    wrong = []
    tokens, birth = dict(model.tokens.items()), Taus.default(model.tokens)
    if model.inner_dim != model.width:
        wrong.append(
            f"model.head_dim ({model.head_dim}): it computes width / heads, "
            f"{model.width} / {model.heads}"
        )
    if len({tokens["query"], tokens["key"], tokens["value"]}) > 1:
        wrong.append(
            f"model.tokens.query, key and value ({tokens['query']}, {tokens['key']}, "
            f"{tokens['value']}): it has one number for the three"
        )
    for role in ROLES:
        tau, born = getattr(model.tau, role), getattr(birth, role)
        if not math.isclose(tau, born, rel_tol=TAU_PRECISION):
            wrong.append(
                f"model.tau.{role} ({tau}): it computes sqrt({tokens[role]}) = {born}, which "
                "growth=gram leads to at once and growth=anneal in training"
            )
    if model.norm_eps != model.final_norm_eps:
        wrong.append(
            f"model.norm_eps ({model.norm_eps}) beside model.final_norm_eps "
            f"({model.final_norm_eps}): it has one epsilon for both"
        )
    if not model.rotary_base.is_integer():
        wrong.append(f"model.rotary_base ({model.rotary_base}): it takes a whole number")
    return wrong
