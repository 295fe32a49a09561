"""The sizes of a model, and what follows from them without building it.

Shapes: `D` width, `N` parameter tokens, `H` heads, `C` head dim, `L` layers, `V` vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from tokengrow.errors import UserError
from tokengrow.kernels.reference import ACTIVATIONS
from tokengrow.model.presets import PADDED_VOCABULARY, PRESETS

ROLES = ("query", "key", "value", "output", "ffn")
"""The five Pattention layers of a block."""

INITS = ("balanced", "published")
"""The weight initialisations: see `TokenFormer.init_weights`."""

PUBLISHED_ROTARY_FRACTION = 0.25


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """N, the number of parameter tokens, of each Pattention role."""

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
        """(role, N) pairs in the order of `ROLES`."""
        return ((role, getattr(self, role)) for role in ROLES)


@dataclass(frozen=True, kw_only=True)
class Taus:
    """tau, the scale after the L2 norm, of each Pattention role; 0 means sqrt(N) at birth."""

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
    def default(cls, tokens: Tokens) -> "Taus":
        """sqrt(N) for each role: the published definition."""
        return cls(**{role: math.sqrt(n) for role, n in tokens.items()})

    def towards(self, end: "Taus", share: float) -> "Taus":
        """Those on the way to others: tau² moves linearly, and is there at a share of 1."""
        if share >= 1:
            return end

        def between(start: float, end: float) -> float:
            return math.sqrt(start**2 + share * (end**2 - start**2))

        return Taus(**{role: between(getattr(self, role), getattr(end, role)) for role in ROLES})


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """What a TokenFormer and the Transformer beside it have in common.

    Raises:
        UserError: sizes that do not fit together, naming the key.
    """

    vocab_size: int
    """V: rows of the embedding."""
    context_length: int
    """Tokens in a training sequence (T)."""
    layers: int
    """L: transformer blocks."""
    width: int
    """D: channels of the residual stream."""
    heads: int
    """H: attention heads."""
    head_dim: int = 0
    """C: channels of a head; 0 means width / heads."""
    rotary_channels: int = -1
    """Rotated channels of each head (even); -1 means the published 25 % of head_dim."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-5
    """Epsilon of the block layer norms."""
    final_norm_eps: float = 1e-5
    """Epsilon of the final layer norm."""
    init: str = "balanced"
    """How weights start: balanced (unit variance, blocks start as the identity) or published."""

    def __post_init__(self) -> None:
        for key in ("vocab_size", "context_length", "layers", "width", "heads"):
            value = getattr(self, key)
            require(value >= 1, f"model.{key} must be at least 1, not {value}")
        require(self.init in INITS, f"model.init {self.init!r}: valid are {', '.join(INITS)}")
        for key in ("rotary_base", "norm_eps", "final_norm_eps"):
            value = getattr(self, key)
            require(value > 0, f"model.{key} must be positive, not {value}")
        self._derive_head()
        require(
            0 <= self.rotary_channels <= self.head_dim and self.rotary_channels % 2 == 0,
            f"model.rotary_channels must be even and at most head_dim ({self.head_dim}), "
            f"not {self.rotary_channels}",
        )

    def _derive_head(self) -> None:
        if self.head_dim == 0:
            require(
                self.width % self.heads == 0,
                f"model.heads ({self.heads}) does not divide model.width ({self.width}): "
                "change one of them or give model.head_dim",
            )
            object.__setattr__(self, "head_dim", self.width // self.heads)
        require(self.head_dim >= 1, f"model.head_dim must be at least 1, not {self.head_dim}")
        if self.rotary_channels == -1:
            # An odd quarter (head_dim 12: 3 channels) cannot be split in halves: round down.
            channels = int(self.head_dim * PUBLISHED_ROTARY_FRACTION) // 2 * 2
            object.__setattr__(self, "rotary_channels", channels)

    @property
    def architecture(self) -> str:
        """Which model this is: a key of `tokengrow.model.architectures.ARCHITECTURES`."""
        raise NotImplementedError

    @property
    def grows(self) -> bool:
        """Whether a model of this config can be made larger, or smaller, as it is trained."""
        return False

    @property
    def inner_dim(self) -> int:
        """H * C: channels of all heads together."""
        return self.heads * self.head_dim

    def num_parameters(self) -> int:
        """All parameters, a tied embedding counted once."""
        raise NotImplementedError

    def multiplied_parameters(self) -> int:
        """P, those that every token is multiplied by: all, where the embedding is the head too."""
        return self.num_parameters()

    def flops_per_token(self, context_length: int | None = None) -> int:
        """Training FLOPs (forward and backward) of one token: 6 P + 6 L T H C.

        6 P: a multiply and an add per parameter forward, twice that backward (Kaplan et al.,
        arXiv 2001.08361, section 2.1). A tied embedding counts for the output head; one that is
        only looked up does not. 6 L T H C: scores and mixing of causal attention, where a token
        sees T / 2 others on average.

        Args:
            context_length: T; by default that of the config.
        """
        length = self.context_length if context_length is None else context_length
        return 6 * self.multiplied_parameters() + 6 * self.layers * length * self.inner_dim

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, every derived size included."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(LanguageModelConfig):
    """What a TokenFormer is. Derived sizes are numbers once the object exists.

    Raises:
        UserError: sizes that do not fit together, naming the key.
    """

    tokens: Tokens
    """N: parameter tokens per Pattention role."""
    tau: Taus = field(default_factory=Taus)
    """Scale after the L2 norm per role: sqrt(N) at birth, kept by growth."""
    activation: str = "l2_norm_gelu"
    """What turns scores into weights: l2_norm_gelu, gelu_l2_norm or softmax."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for role, n in self.tokens.items():
            require(n >= 1, f"model.tokens.{role} must be at least 1, not {n}")
        require(
            self.activation in ACTIVATIONS,
            f"model.activation {self.activation!r}: valid are {', '.join(ACTIVATIONS)}",
        )
        birth = Taus.default(self.tokens)
        taus = {role: getattr(self.tau, role) or getattr(birth, role) for role in ROLES}
        for role, tau in taus.items():
            require(tau > 0, f"model.tau.{role} must be positive, not {tau}")
        object.__setattr__(self, "tau", Taus(**taus))

    @classmethod
    def preset(cls, name: str) -> "ModelConfig":
        """A published size, with the published initialisation.

        Args:
            name: a key of `tokengrow.model.presets.PRESETS`.

        Raises:
            UserError: a name that is not there.
        """
        if name not in PRESETS:
            raise UserError(f"model.preset {name!r}: valid are {', '.join(PRESETS)}")
        layers, width, heads, n, n_ffn, context = PRESETS[name]
        return cls(
            vocab_size=PADDED_VOCABULARY,
            context_length=context,
            layers=layers,
            width=width,
            heads=heads,
            tokens=Tokens(query=n, key=n, value=n, output=n, ffn=n_ffn),
            init="published",
        )

    @property
    def architecture(self) -> str:
        """A TokenFormer: what a config is that says nothing else."""
        return "tokenformer"

    @property
    def grows(self) -> bool:
        """By parameter tokens, width, heads and layers."""
        return True

    def role_shape(self, role: str) -> tuple[int, int, int]:
        """(N, D_in, D_out) of a Pattention role."""
        d_in = self.inner_dim if role == "output" else self.width
        d_out = self.width if role in ("output", "ffn") else self.inner_dim
        return getattr(self.tokens, role), d_in, d_out

    def num_parameters(self) -> int:
        """All parameters, the tied embedding counted once."""
        block = 0
        for role in ROLES:
            n, d_in, d_out = self.role_shape(role)
            block += n * (d_in + d_out)
        return self.vocab_size * self.width + self.layers * block + 2 * self.width

    def differences(self, other: "ModelConfig") -> dict[str, tuple[Any, Any]]:
        """Dotted key to (mine, theirs) for every field that differs."""
        found: dict[str, tuple[Any, Any]] = {}
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if isinstance(mine, Tokens | Taus):
                for role in ROLES:
                    pair = getattr(mine, role), getattr(theirs, role)
                    if pair[0] != pair[1]:
                        found[f"{item.name}.{role}"] = pair
            elif mine != theirs:
                found[item.name] = mine, theirs
        return found


def require(condition: bool, message: str) -> None:
    """Raises a UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


ParameterTokens = Tokens
