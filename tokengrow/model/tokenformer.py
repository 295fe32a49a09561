"""TokenFormer: a decoder-only language model whose every projection is Pattention.

Also what it shares with the Transformer beside it (`tokengrow.model.transformer`): all but the
layers in the blocks and how weights start.

TokenFormer, arXiv 2410.23168. Pre-norm blocks without affine, rotary positions on part of each
head, a final norm with affine, the embedding tied to the output head, no biases.

Shapes: `B` batch, `T` sequence, `S` cached sequence, `D` width, `H` heads, `C` head dim, `L`
layers, `V` vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import reduce
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokengrow.kernels.dispatch import check_kernel
from tokengrow.kernels.loss import linear_cross_entropy
from tokengrow.model.config import LanguageModelConfig, ModelConfig, Taus
from tokengrow.model.pattention import Pattention, apply_layers
from tokengrow.model.rotary import rotary_table, rotate

ATTENTION_BACKENDS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""What computes attention: the first of these that takes the tensors."""

INIT_STD = 0.02
GELU_POWER = 0.425
"""E[GELU(z)²] for z ~ N(0, 1): the share of a unit score's power that passes the activation."""


class KVCache:
    """Keys (after rotary) and values of the tokens seen so far.

    Texts of different lengths end together: the shorter ones have padding in front, which only
    padding sees, and the positions of each are counted from where it starts.

    Args:
        config: the model's.
        batch: B.
        capacity: the most tokens it will hold, S.
        dtype: of keys and values.
        device: where they live.
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.layers, batch, config.heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)  # [L, B, H, S, C]
        self.values = torch.empty(shape, dtype=dtype, device=device)  # [L, B, H, S, C]
        self.length = 0
        self.start: Tensor | None = None
        """[B] int64, the slot in which each text starts; None: all in the first."""

    @property
    def capacity(self) -> int:
        """The most tokens that fit."""
        return self.keys.shape[3]

    @property
    def position(self) -> int | Tensor:
        """Of the next token in its text: of all texts, or [B] of each."""
        return self.length if self.start is None else self.length - self.start

    def visible(self, length: int) -> Tensor | None:
        """What the next T tokens attend to, before they are written.

        Returns:
            [T, S] or [B, 1, T, S] bool; None: all of the past, and among themselves what is causal.
        """
        if self.start is None and (self.length == 0 or length == 1):
            return None
        slots = torch.arange(self.length + length, device=self.keys.device)
        own = slots[self.length :, None]  # [T, 1]
        seen = slots <= own
        if self.start is None:
            return seen
        # Padding sees itself: a token that sees nothing would be NaN, and 0 times NaN is NaN.
        return seen & ((slots >= self.start[:, None, None, None]) | (slots == own))

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the [B, H, T, C] of new tokens behind the old; returns all of them, [B, H, S,
        C]."""
        end = self.length + key.shape[2]
        if end > self.capacity:
            raise ValueError(f"the KV cache holds {self.capacity} tokens; {end} were given")
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    """Causal self-attention; its projections are a subclass's."""

    output: nn.Module

    def __init__(self, config: LanguageModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.head_dim = layer, config.heads, config.head_dim

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """Query, key and value [B, T, H C] of [B, T, D]."""
        raise NotImplementedError

    def project_one(self, x: Tensor) -> Sequence[Tensor]:
        """Likewise [B, H C] of a single token [B, D]."""
        return self.project(x)

    def forward(
        self, x: Tensor, table: tuple[Tensor, Tensor], cache: KVCache | None = None
    ) -> Tensor:
        """[B, T, D] to [B, T, D]; with a cache, T new tokens attend to it and to each other."""
        batch, length, _ = x.shape
        query, key, value = [
            projected.view(batch, length, self.heads, self.head_dim)
            for projected in self.project(x)
        ]  # [B, T, H, C]
        # Rotated as they lie in memory, they and their gradients are never copied to be transposed.
        positions = table[0].unsqueeze(-2), table[1].unsqueeze(-2)  # [T, 1, R] or [B, T, 1, R]
        query, key = rotate(query, positions), rotate(key, positions)
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        mask, causal = None, True
        if cache is not None:
            mask = cache.visible(length)
            causal = mask is None and cache.length == 0
            key, value = cache.extend(self.layer, key.to(cache.keys), value.to(cache.values))
            query = query.to(key)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        return self.output(mixed.transpose(1, 2).reshape(batch, length, -1))


class PattentionAttention(Attention):
    """With Pattention projections."""

    output: Pattention

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.query = _pattention(config, "query")
        self.key = _pattention(config, "key")
        self.value = _pattention(config, "value")
        self.output = _pattention(config, "output")

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """Query, key and value [B, T, H C] of [B, T, D]."""
        return apply_layers(x, [self.query, self.key, self.value])

    def project_one(self, x: Tensor) -> Sequence[Tensor]:
        """Likewise [B, H C] of a single token [B, D]."""
        # Three products with the same x, not one with stacked keys: the stack would be a second
        # copy of these weights.
        return [layer(x) for layer in (self.query, self.key, self.value)]


class Block(nn.Module):
    """`x += attention(norm(x)); x += ffn(norm(x))`; what these are is a subclass's."""

    attention: Attention
    ffn: nn.Module
    attention_norm: nn.LayerNorm
    ffn_norm: nn.LayerNorm

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()

    def forward(
        self, x: Tensor, table: tuple[Tensor, Tensor], cache: KVCache | None = None
    ) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        x = x + self.attention(self.attention_norm(x), table, cache)
        return x + self.ffn(self.ffn_norm(x))


class PattentionBlock(Block):
    """Of a TokenFormer: the norms have no affine."""

    attention: PattentionAttention
    ffn: Pattention

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.attention = PattentionAttention(config, layer)
        self.ffn = _pattention(config, "ffn")
        self.attention_norm, self.ffn_norm = (
            nn.LayerNorm(config.width, eps=config.norm_eps, elementwise_affine=False)
            for _ in range(2)
        )


class LanguageModel(nn.Module):
    """Embedding, blocks, final norm, output head. `model(ids)` maps [B, T] to [B, T, V] logits.

    Weights are initialised from torch's global generator; call `init_weights` with a generator of
    your own to choose the seed.

    Args:
        config: the model's.
    """

    block: ClassVar[type[Block]]
    """What its layers are."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config: LanguageModelConfig = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(self.block(config, layer) for layer in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width, eps=config.final_norm_eps)

    @property
    def head_weight(self) -> Tensor:
        """[V, D] of the output head: that of the embedding, where the two are tied."""
        return self.embedding.weight

    def forward(
        self, ids: Tensor, cache: KVCache | None = None, targets: Tensor | None = None
    ) -> Tensor:
        """Logits of the next token at every position, or how far they are from the targets.

        Args:
            ids: [B, T] int64 token ids.
            cache: of the tokens before; it is extended by these T.
            targets: [B, T] int64, the tokens that do come next.

        Returns:
            [B, T, V]; with targets the scalar mean cross-entropy in nats per token, for which a GPU
            never holds all logits.
        """
        x = self.hidden_states(ids, cache)
        if targets is None:
            return self.logits(x)
        return linear_cross_entropy(x.flatten(0, 1), self.head_weight, targets.flatten())

    def hidden_states(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """What the output head is given: [B, T, D] of [B, T] ids, behind the final norm.

        A cache is extended. This is no call of the module, so one that is sharded or wrapped goes
        through `forward`.
        """
        start = 0 if cache is None else cache.position
        config = self.config
        table = rotary_table(
            start, ids.shape[1], config.rotary_channels, config.rotary_base, ids.device
        )
        x = self.embedding(ids)
        with fastest_attention():
            for block in self.blocks:
                x = block(x, table, cache)
        if cache is not None:
            cache.length += ids.shape[1]
        return self.final_norm(x)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        return F.linear(hidden_states, self.head_weight)

    @classmethod
    def from_weights(
        cls, config: Any, weights: Mapping[str, Tensor], dtype: torch.dtype | None = None
    ) -> Self:
        """A model on the CPU, in eval mode, with a copy of these weights.

        Args:
            config: the model's.
            weights: its state dict.
            dtype: of the copy; by default the narrowest that holds every weight.
        """
        with torch.device("meta"):
            model = cls(config)
        model = model.to(dtype or dtype_of(weights)).to_empty(device="cpu")
        model.load_state_dict(weights)
        return model.eval()

    def to_weights(self) -> dict[str, Tensor]:
        """The state dict on the CPU, detached: what `from_weights` takes."""
        return {name: tensor.detach().cpu() for name, tensor in self.state_dict().items()}

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draws all weights anew, in the way that `config.init` names."""
        raise NotImplementedError

    def set_kernel(self, kernel: str) -> None:
        """Chooses how every Pattention layer is computed, by a name in `KERNELS`, if it has any."""


class TokenFormer(LanguageModel):
    """The language model whose every projection is Pattention; the embedding is the head too."""

    config: ModelConfig
    block = PattentionBlock

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.init_weights()

    def set_tau(self, tau: Taus) -> None:
        """Scales the scores of every layer by these from now on."""
        self.config = replace(self.config, tau=tau)
        for block in self.blocks:
            for role, layer in pattention_layers(block):
                layer.tau = getattr(tau, role)

    def set_kernel(self, kernel: str) -> None:
        """Set the kernel of all Pattention layers, by a name in `KERNELS`."""
        valid = check_kernel(kernel)
        for block in self.blocks:
            for _, layer in pattention_layers(block):
                layer.kernel = valid

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draws all weights anew, in the way that `config.init` names.

        | tensor | balanced | published |
        | --- | --- | --- |
        | embedding, all keys | N(0, 0.02) | N(0, 0.02) |
        | values of query, key, value | N(0, 1 / sqrt(0.425 N)) | N(0, 2 / L / sqrt(D)) |
        | values of output, ffn | 0 | N(0, 2 / L / sqrt(D)) |
        | final norm | weight 1, bias 0 | weight 1, bias 0 |

        Balanced: every output channel of query, key and value starts with unit variance, and every
        block as the identity.
        """
        nn.init.normal_(self.embedding.weight, 0.0, INIT_STD, generator)
        for block in self.blocks:
            for role, layer in pattention_layers(block):
                nn.init.normal_(layer.key_param_tokens, 0.0, INIT_STD, generator)
                std = init_value_std(self.config, role)
                nn.init.normal_(layer.value_param_tokens, 0.0, std, generator)
        nn.init.ones_(self.final_norm.weight)
        nn.init.zeros_(self.final_norm.bias)


def fastest_attention() -> AbstractContextManager[None]:
    """Chooses what computes attention, in the order of `ATTENTION_BACKENDS`.

    While gradients are computed cuDNN comes first: on an H100 it takes 0.6 of the time of
    FlashAttention 2, but plans anew for every length, which takes longer than a short text.
    """
    first = [SDPBackend.CUDNN_ATTENTION] if torch.is_grad_enabled() else []
    return sdpa_kernel([*first, *ATTENTION_BACKENDS], set_priority=True)


def weight_shapes(config: ModelConfig) -> dict[str, list[int]]:
    """Name of every weight of a model to its shape."""
    with torch.device("meta"):
        state = TokenFormer(config).state_dict()
    return {name: list(tensor.shape) for name, tensor in state.items()}


def dtype_of(weights: Mapping[str, Tensor]) -> torch.dtype:
    """The narrowest dtype that holds every weight as it is."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in weights.values()))


def pattention_layers(block: nn.Module) -> list[tuple[str, Pattention]]:
    """(role, layer) of the five Pattention layers of a block, in the order of `ROLES`."""
    named = ((name.rpartition(".")[2], module) for name, module in block.named_modules())
    return [(role, module) for role, module in named if isinstance(module, Pattention)]


def published_value_std(config: ModelConfig) -> float:
    """Standard deviation at which the published code draws every value parameter token."""
    return 2 / config.layers / math.sqrt(config.width)


def init_value_std(config: ModelConfig, role: str) -> float:
    """Standard deviation at which the value parameter tokens of a role are born."""
    if config.init == "published":
        return published_value_std(config)
    if role in ("output", "ffn"):
        return 0.0
    return 1 / math.sqrt(GELU_POWER * getattr(config.tokens, role))


def _pattention(config: ModelConfig, role: str) -> Pattention:
    return Pattention(*config.role_shape(role), config.activation, getattr(config.tau, role))
