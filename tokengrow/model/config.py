"""Model configs: sizes, and the counts that follow from them without building the model.

Shapes: `D` width, `N` parameter tokens, `H` heads, `C` head dim, `L` layers, `V` vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from tokengrow.errors import UserError
from tokengrow.kernels.reference import ACTIVATIONS, Activation
from tokengrow.model.presets import PADDED_VOCABULARY, PRESETS

ROLES = ("query", "key", "value", "output", "ffn")
"""Roles of the five Pattention layers of a block."""

Init = Literal["balanced", "published"]
"""Initialisation of the weights: see `TokenFormer.init_weights`."""

INITS: tuple[Init, ...] = get_args(Init)
"""Names of the initialisations."""

PUBLISHED_ROTARY_FRACTION = 0.25
"""Share of the channels of a head that the published models rotate."""


@dataclass(frozen=True, kw_only=True)
class ParameterTokens:
    """Number of parameter tokens, N, of each Pattention role."""

    query: int
    """Parameter tokens of the query projection."""
    key: int
    """Parameter tokens of the key projection."""
    value: int
    """Parameter tokens of the value projection."""
    output: int
    """Parameter tokens of the output projection of attention."""
    ffn: int
    """Parameter tokens of the feed-forward layer."""

    def items(self) -> Iterator[tuple[str, int]]:
        """Yield (role, N) in the order of `ROLES`."""
        return ((role, getattr(self, role)) for role in ROLES)


"""Public name of `Tokens`."""


@dataclass(frozen=True, kw_only=True)
class Taus:
    """Scale after the L2 norm, tau, of each Pattention role; 0 means sqrt(N) at initialisation."""

    query: float = 0.0
    """tau of the query projection."""
    key: float = 0.0
    """tau of the key projection."""
    value: float = 0.0
    """tau of the value projection."""
    output: float = 0.0
    """tau of the output projection of attention."""
    ffn: float = 0.0
    """tau of the feed-forward layer."""

    @classmethod
    def default(cls, tokens: ParameterTokens) -> "Taus":
        """Return sqrt(N) for each role, the published definition."""
        return cls(**{role: math.sqrt(n) for role, n in tokens.items()})

    def interpolate(self, end: "Taus", share: float) -> "Taus":
        """Interpolate to other taus: tau² changes linearly, and a share of 1 gives `end`."""
        if share >= 1:
            return end

        def between(start: float, end: float) -> float:
            return math.sqrt(start**2 + share * (end**2 - start**2))

        return Taus(**{role: between(getattr(self, role), getattr(end, role)) for role in ROLES})


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """Sizes that a TokenFormer and the baseline Transformer have in common.

    Raises:
        UserError: a size is invalid; the message names its key.
    """

    vocab_size: int
    """Rows of the embedding (V)."""
    context_length: int
    """Tokens in a training sequence (T)."""
    layers: int
    """Transformer blocks (L)."""
    width: int
    """Channels of the residual stream (D)."""
    heads: int
    """Attention heads (H)."""
    head_dim: int = 0
    """Channels of a head (C); 0 means width / heads."""
    rotary_channels: int = -1
    """Rotated channels of each head, an even number; -1 means the published 25 % of head_dim."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-5
    """Epsilon of the layer norms in the blocks."""
    final_norm_eps: float = 1e-5
    """Epsilon of the final layer norm."""
    init: Init = "balanced"
    """Initialisation: balanced (unit variance, blocks start as the identity) or published."""

    def __post_init__(self) -> None:
        for key in ("vocab_size", "context_length", "layers", "width", "heads"):
            value = getattr(self, key)
            require(value >= 1, f"model.{key} must be at least 1, got {value}.")
        require(
            self.init in INITS,
            f"model.init must be one of {', '.join(INITS)}, got {self.init!r}.",
        )
        for key in ("rotary_base", "norm_eps", "final_norm_eps"):
            value = getattr(self, key)
            require(value > 0, f"model.{key} must be positive, got {value}.")
        if self.head_dim == 0:
            require(
                self.width % self.heads == 0,
                f"model.width must be a multiple of model.heads ({self.heads}), got {self.width}. "
                "Change one of them, or set model.head_dim.",
            )
            object.__setattr__(self, "head_dim", self.width // self.heads)
        require(self.head_dim >= 1, f"model.head_dim must be at least 1, got {self.head_dim}.")
        if self.rotary_channels == -1:
            # Rounded down to an even number, because the channels are split in halves.
            channels = int(self.head_dim * PUBLISHED_ROTARY_FRACTION) // 2 * 2
            object.__setattr__(self, "rotary_channels", channels)
        require(
            0 <= self.rotary_channels <= self.head_dim and self.rotary_channels % 2 == 0,
            f"model.rotary_channels must be even and at most head_dim ({self.head_dim}), "
            f"got {self.rotary_channels}.",
        )

    @property
    def architecture(self) -> str:
        """Name of the architecture: a key of `tokengrow.model.architectures.ARCHITECTURES`."""
        raise NotImplementedError

    @property
    def can_grow(self) -> bool:
        """Whether a trained model of this config can be grown or pruned."""
        return False

    @property
    def inner_dim(self) -> int:
        """Channels of all heads together, H * C."""
        return self.heads * self.head_dim

    def num_parameters(self) -> int:
        """Return the number of parameters; a tied embedding counts once."""
        raise NotImplementedError

    def matmul_parameters(self) -> int:
        """Return P, the parameters that multiply every token: all of them if the head is tied."""
        return self.num_parameters()

    def flops_per_token(self, context_length: int | None = None) -> int:
        """Return the training FLOPs (forward and backward) of one token: 6 P + 6 L T H C.

        6 P: a multiply and an add per parameter in the forward pass, and twice that in the backward
        pass (Kaplan et al., arXiv 2001.08361, section 2.1). A tied embedding counts as the output
        head, and an untied one does not count. 6 L T H C: scores and weighted sums of causal
        attention, where a token attends to T / 2 others on average.

        Args:
            context_length: T; default: that of the config.
        """
        length = self.context_length if context_length is None else context_length
        return 6 * self.matmul_parameters() + 6 * self.layers * length * self.inner_dim

    def to_dict(self) -> dict[str, Any]:
        """Return a plain nested dict, which includes every derived size."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(LanguageModelConfig):
    """Sizes of a TokenFormer. Derived sizes are filled in at construction.

    Raises:
        UserError: a size is invalid; the message names its key.
    """

    tokens: ParameterTokens
    """Parameter tokens per Pattention role (N)."""
    tau: Taus = field(default_factory=Taus)
    """Scale after the L2 norm per role: sqrt(N) at initialisation, unchanged by growth."""
    activation: Activation = "l2_norm_gelu"
    """Function from scores to weights: l2_norm_gelu, gelu_l2_norm or softmax."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for role, n in self.tokens.items():
            require(n >= 1, f"model.tokens.{role} must be at least 1, got {n}.")
        require(
            self.activation in ACTIVATIONS,
            f"model.activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}.",
        )
        default = Taus.default(self.tokens)
        taus = {role: getattr(self.tau, role) or getattr(default, role) for role in ROLES}
        for role, tau in taus.items():
            require(tau > 0, f"model.tau.{role} must be positive, got {tau}.")
        object.__setattr__(self, "tau", Taus(**taus))

    @classmethod
    def preset(cls, name: str) -> "ModelConfig":
        """Return the config of a published model, with the published initialisation.

        Args:
            name: a key of `tokengrow.model.presets.PRESETS`.

        Raises:
            UserError: the name is unknown.
        """
        if name not in PRESETS:
            raise UserError(f"model.preset must be one of {', '.join(PRESETS)}, got {name!r}.")
        layers, width, heads, n, n_ffn, context = PRESETS[name]
        return cls(
            vocab_size=PADDED_VOCABULARY,
            context_length=context,
            layers=layers,
            width=width,
            heads=heads,
            tokens=ParameterTokens(query=n, key=n, value=n, output=n, ffn=n_ffn),
            init="published",
        )

    @property
    def architecture(self) -> str:
        """Name of the architecture: tokenformer, the default."""
        return "tokenformer"

    @property
    def can_grow(self) -> bool:
        """True, by parameter tokens, width, heads and layers."""
        return True

    def role_shape(self, role: str) -> tuple[int, int, int]:
        """Return (N, D_in, D_out) of a Pattention role."""
        d_in = self.inner_dim if role == "output" else self.width
        d_out = self.width if role in ("output", "ffn") else self.inner_dim
        return getattr(self.tokens, role), d_in, d_out

    def num_parameters(self) -> int:
        """Return the number of parameters; the tied embedding counts once."""
        block = 0
        for role in ROLES:
            n, d_in, d_out = self.role_shape(role)
            block += n * (d_in + d_out)
        return self.vocab_size * self.width + self.layers * block + 2 * self.width

    def differences(self, other: "ModelConfig") -> dict[str, tuple[Any, Any]]:
        """Return dotted key to (own value, other value) for every field that differs."""
        pairs: dict[str, tuple[Any, Any]] = {}
        for item in fields(self):
            own_value, other_value = getattr(self, item.name), getattr(other, item.name)
            if isinstance(own_value, ParameterTokens | Taus):
                for role in ROLES:
                    pair = getattr(own_value, role), getattr(other_value, role)
                    pairs[f"{item.name}.{role}"] = pair
            else:
                pairs[item.name] = own_value, other_value
        return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def require(condition: bool, message: str) -> None:
    """Raise `UserError` with a message unless the condition holds."""
    if not condition:
        raise UserError(message)
