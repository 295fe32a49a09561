"""TokenFormer: a decoder-only language model in which every projection is Pattention.

This module also defines the parts that it shares with the baseline Transformer
(`tokengrow.model.transformer`). That differs in the layers of the blocks and in initialisation.

TokenFormer, arXiv 2410.23168: pre-norm blocks without affine, rotary positions on part of each
head, a final norm with affine, the embedding tied to the output head, no biases.

Shapes: `B` batch, `T` sequence, `S` cached sequence, `D` width, `H` heads, `C` head dim, `L`
layers, `V` vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import reduce
from typing import ClassVar, Self

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
"""Attention backends in order of priority; the first one that supports the tensors is used."""

INIT_STD = 0.02
"""Standard deviation of the initial embedding and key parameter tokens."""
GELU_POWER = 0.425
"""E[GELU(z)²] for z ~ N(0, 1): the share of the power of a unit score after the activation."""


class KVCache:
    """Keys (after rotary) and values of all previous tokens.

    Texts of different lengths end in the same slot. Shorter ones are padded on the left. Only
    padding attends to padding, and positions are counted from the start of each text.

    Args:
        config: config of the model.
        batch: B.
        capacity: maximum number of tokens, S.
        dtype: dtype of keys and values.
        device: device of keys and values.
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
        """[B] int64, slot in which each text starts; None: all start in the first slot."""

    @property
    def capacity(self) -> int:
        """Maximum number of tokens."""
        return self.keys.shape[3]

    @property
    def position(self) -> int | Tensor:
        """Position of the next token in its text: one for all texts, or [B] of each text."""
        return self.length if self.start is None else self.length - self.start

    def attention_mask(self, length: int) -> Tensor | None:
        """Return the mask of the next T tokens, before they are added.

        Returns:
            [T, S] or [B, 1, T, S] bool, True for slots that a token attends to. None: each token
            attends to all previous tokens, without a mask.
        """
        if self.start is None and (self.length == 0 or length == 1):
            return None
        slots = torch.arange(self.length + length, device=self.keys.device)
        own = slots[self.length :, None]  # [T, 1]
        causal = slots <= own
        if self.start is None:
            return causal
        # Padding attends to itself. With an empty row it would be NaN, and 0 times NaN is NaN.
        return causal & ((slots >= self.start[:, None, None, None]) | (slots == own))

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, H, T, C] of a layer, and return all of them, [B, H, S, C]."""
        end = self.length + key.shape[2]
        if end > self.capacity:
            raise ValueError(f"The KV cache must hold {end} tokens, but has {self.capacity} slots.")
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    """Causal self-attention; subclasses define the projections."""

    output: nn.Module

    def __init__(self, config: LanguageModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.head_dim = layer, config.heads, config.head_dim

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """Return query, key and value [B, T, H C] of [B, T, D]."""
        raise NotImplementedError

    def project_token(self, x: Tensor) -> Sequence[Tensor]:
        """Return query, key and value [B, H C] of a single token [B, D]."""
        return self.project(x)

    def forward(
        self, x: Tensor, table: tuple[Tensor, Tensor], cache: KVCache | None = None
    ) -> Tensor:
        """Return attention [B, T, D] of [B, T, D]; with a cache, tokens attend to it too."""
        batch, length, _ = x.shape
        query, key, value = [
            projected.view(batch, length, self.heads, self.head_dim)
            for projected in self.project(x)
        ]  # [B, T, H, C]
        # Rotated before the transposition, so that neither they nor their gradients are copied.
        positions = table[0].unsqueeze(-2), table[1].unsqueeze(-2)  # [T, 1, R] or [B, T, 1, R]
        query, key = rotate(query, positions), rotate(key, positions)
        query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
        mask, causal = None, True
        if cache is not None:
            mask = cache.attention_mask(length)
            causal = mask is None and cache.length == 0
            key, value = cache.extend(self.layer, key.to(cache.keys), value.to(cache.values))
            query = query.to(key)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        out: Tensor = self.output(mixed.transpose(1, 2).reshape(batch, length, -1))
        return out


class PattentionAttention(Attention):
    """Attention with Pattention projections."""

    output: Pattention

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.query = _pattention(config, "query")
        self.key = _pattention(config, "key")
        self.value = _pattention(config, "value")
        self.output = _pattention(config, "output")

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """Return query, key and value [B, T, H C] of [B, T, D]."""
        return apply_layers(x, [self.query, self.key, self.value])

    def project_token(self, x: Tensor) -> Sequence[Tensor]:
        """Return query, key and value [B, H C] of a single token [B, D]."""
        # Three products with the same x instead of one with stacked keys, because the stack would
        # be a second copy of these weights.
        return [layer(x) for layer in (self.query, self.key, self.value)]


class Block(nn.Module):
    """Residual block, `x += attention(norm(x)); x += ffn(norm(x))`; subclasses define the parts."""

    attention: Attention
    ffn: nn.Module
    attention_norm: nn.LayerNorm
    ffn_norm: nn.LayerNorm

    def __init__(self, config: LanguageModelConfig, layer: int) -> None:
        super().__init__()

    def forward(
        self, x: Tensor, table: tuple[Tensor, Tensor], cache: KVCache | None = None
    ) -> Tensor:
        """Return the residual stream [B, T, D] after the block."""
        x = x + self.attention(self.attention_norm(x), table, cache)
        out: Tensor = x + self.ffn(self.ffn_norm(x))
        return out


class PattentionBlock(Block):
    """Block of a TokenFormer; its norms have no affine."""

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
    """Embedding, blocks, final norm and output head: ids [B, T] to logits [B, T, V].

    Weights are initialised from the global generator of torch. Call `init_weights` with a generator
    to choose the seed.

    Args:
        config: config of the model.
    """

    block_class: ClassVar[type[Block]]
    """Class of the blocks."""

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.config: LanguageModelConfig = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(
            self.block_class(config, layer) for layer in range(config.layers)
        )
        self.final_norm = nn.LayerNorm(config.width, eps=config.final_norm_eps)

    @property
    def head_weight(self) -> Tensor:
        """Weight of the output head [V, D]: that of the embedding, if the two are tied."""
        return self.embedding.weight

    def forward(
        self, ids: Tensor, cache: KVCache | None = None, targets: Tensor | None = None
    ) -> Tensor:
        """Return the logits of the next token at every position, or the loss for given targets.

        Args:
            ids: [B, T] int64 token ids.
            cache: cache of the previous tokens; these T tokens are added to it.
            targets: [B, T] int64, the actual next tokens.

        Returns:
            Logits [B, T, V]. With targets: the scalar mean cross-entropy in nats per token, for
            which a GPU never stores all logits.
        """
        x = self.hidden_states(ids, cache)
        if targets is None:
            return self.logits(x)
        return linear_cross_entropy(x.flatten(0, 1), self.head_weight, targets.flatten())

    def hidden_states(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return the inputs of the output head [B, T, D], after the final norm, for ids [B, T].

        The tokens are added to the cache. This does not call the module, so a sharded or wrapped
        model must use `forward`.
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
        normed: Tensor = self.final_norm(x)
        return normed

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Return logits [..., V] of hidden states [..., D]."""
        return F.linear(hidden_states, self.head_weight)

    @classmethod
    def from_weights(
        cls,
        config: LanguageModelConfig,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Return a model on the CPU, in eval mode, with a copy of the weights.

        Args:
            config: config of the model.
            weights: state dict of the model.
            dtype: dtype of the copy; default: the narrowest that represents every weight.
        """
        with torch.device("meta"):
            model = cls(config)
        model = model.to(dtype or dtype_of(weights)).to_empty(device="cpu")
        model.load_state_dict(weights)
        return model.eval()

    def to_weights(self) -> dict[str, Tensor]:
        """Return the state dict on the CPU, detached, as `from_weights` expects it."""
        return {name: tensor.detach().cpu() for name, tensor in self.state_dict().items()}

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise all weights by the method `config.init`."""
        raise NotImplementedError

    def set_kernel(self, kernel: str) -> None:
        """Set the kernel of all Pattention layers, if there are any, by a name in `KERNELS`."""


class TokenFormer(LanguageModel):
    """Language model in which every projection is Pattention; the embedding is also the head."""

    config: ModelConfig
    block_class = PattentionBlock

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.init_weights()

    def set_tau(self, tau: Taus) -> None:
        """Set the scale of the scores in every layer."""
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
        """Initialise all weights by the method `config.init`.

        | tensor | balanced | published |
        | --- | --- | --- |
        | embedding, all keys | N(0, 0.02) | N(0, 0.02) |
        | values of query, key, value | N(0, 1 / sqrt(0.425 N)) | N(0, 2 / L / sqrt(D)) |
        | values of output, ffn | 0 | N(0, 2 / L / sqrt(D)) |
        | final norm | weight 1, bias 0 | weight 1, bias 0 |

        Balanced: every output channel of query, key and value starts with unit variance, and every
        block starts as the identity.
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
    """Return a context that selects the fastest attention backend.

    With gradients, cuDNN comes before `ATTENTION_BACKENDS`. On an H100 it needs 0.6 of the time of
    FlashAttention 2, but it plans again for every length, which takes longer than a short text.
    """
    first = [SDPBackend.CUDNN_ATTENTION] if torch.is_grad_enabled() else []
    return sdpa_kernel([*first, *ATTENTION_BACKENDS], set_priority=True)


def weight_shapes(config: ModelConfig) -> dict[str, list[int]]:
    """Return the name of every weight of a model to its shape."""
    with torch.device("meta"):
        state = TokenFormer(config).state_dict()
    return {name: list(tensor.shape) for name, tensor in state.items()}


def dtype_of(weights: Mapping[str, Tensor]) -> torch.dtype:
    """Return the narrowest dtype that represents every weight exactly."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in weights.values()))


def pattention_layers(block: nn.Module) -> list[tuple[str, Pattention]]:
    """Return (role, layer) of the five Pattention layers of a block, in the order of `ROLES`."""
    named = ((name.rpartition(".")[2], module) for name, module in block.named_modules())
    return [(role, module) for role, module in named if isinstance(module, Pattention)]


def published_value_std(config: ModelConfig) -> float:
    """Return the standard deviation of value parameter tokens in the published code."""
    return 2 / config.layers / math.sqrt(config.width)


def init_value_std(config: ModelConfig, role: str) -> float:
    """Return the initial standard deviation of the value parameter tokens of a role."""
    if config.init == "published":
        return published_value_std(config)
    if role in ("output", "ffn"):
        return 0.0
    return 1 / math.sqrt(GELU_POWER * getattr(config.tokens, role))


def _pattention(config: ModelConfig, role: str) -> Pattention:
    """Return the Pattention layer of a role."""
    return Pattention(*config.role_shape(role), config.activation, getattr(config.tau, role))
