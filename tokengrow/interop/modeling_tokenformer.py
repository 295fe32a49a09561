"""TokenFormer for Hugging Face transformers: the only file of code in an exported folder.

`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` runs it without tokengrow, so
it imports only torch and transformers, and tokengrow never imports it. Tested with transformers
4.57.6 and 5.23.0.

TokenFormer, arXiv 2410.23168: pre-norm blocks with norms without affine parameters, rotary
positions on part of each head, a final norm with affine parameters, an embedding tied to the output
head, no biases.

Shapes: `B` batch, `T` sequence, `S` cached and new sequence, `D` width, `H` heads, `C` head dim,
`R` rotated channels, `L` layers, `N` parameter tokens, `V` vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

INIT_STD = 0.02
GELU_POWER = 0.425
"""E[GELU(z)²] for z ~ N(0, 1): second moment of the activation of unit scores."""

MIN_NORM = 1e-12
"""Norm below which a row of scores counts as zero."""


class TokenFormerConfig(PretrainedConfig):
    """Config of a TokenFormer; the defaults are those of the published 150M model.

    Args:
        vocab_size: vocabulary size V.
        max_position_embeddings: tokens of a training sequence.
        num_hidden_layers: number of layers L.
        hidden_size: model width D.
        num_attention_heads: number of heads H.
        head_dim: head dim C; by default D / H.
        tokens: parameter tokens N of each role (query, key, value, output, ffn); by default D, and
            4 D for ffn.
        tau: scale after the L2 norm of each role; by default sqrt(N).
        activation: l2_norm_gelu, gelu_l2_norm or softmax.
        rotary_channels: rotated channels R, even; by default a quarter of C.
        rotary_base: base of the rotary frequencies.
        norm_eps: epsilon of the layer norms of the blocks.
        final_norm_eps: epsilon of the final layer norm.
        init: distribution of new weights, balanced or published.
        use_cache: whether the model returns a cache of keys and values.
    """

    model_type = "tokenformer"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    # transformers 5 defines these only if they are given.
    bos_token_id = eos_token_id = pad_token_id = None
    tie_word_embeddings = True

    def __init__(
        self,
        vocab_size: int = 50304,
        max_position_embeddings: int = 2048,
        num_hidden_layers: int = 12,
        hidden_size: int = 768,
        num_attention_heads: int = 12,
        head_dim: int | None = None,
        tokens: dict[str, int] | None = None,
        tau: dict[str, float] | None = None,
        activation: str = "l2_norm_gelu",
        rotary_channels: int | None = None,
        rotary_base: float = 10000.0,
        norm_eps: float = 1e-5,
        final_norm_eps: float = 1e-5,
        init: str = "published",
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        default_tokens = dict.fromkeys(("query", "key", "value", "output"), hidden_size)
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.num_hidden_layers = num_hidden_layers
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.tokens = {**default_tokens, "ffn": 4 * hidden_size} if tokens is None else tokens
        self.tau = {role: math.sqrt(n) for role, n in self.tokens.items()} if tau is None else tau
        self.activation = activation
        quarter = self.head_dim // 4 // 2 * 2
        self.rotary_channels = quarter if rotary_channels is None else rotary_channels
        self.rotary_base = rotary_base
        self.norm_eps = norm_eps
        self.final_norm_eps = final_norm_eps
        self.init = init
        self.use_cache = use_cache
        super().__init__(**kwargs)


def _scale_to(rows: Tensor, norm: float) -> Tensor:
    """Scale every row [..., N] to an L2 norm; a zero row stays zero."""
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows * torch.where(norms > MIN_NORM, norm / norms.clamp_min(MIN_NORM), 0.0)


ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "l2_norm_gelu": lambda scores, tau: F.gelu(_scale_to(scores, tau)),
    "gelu_l2_norm": lambda scores, tau: _scale_to(F.gelu(scores), tau),
    "softmax": lambda scores, tau: F.softmax(scores, dim=-1) * tau**2,
}
"""Scores [..., N] and tau to weights [..., N]."""


class Pattention(nn.Module):
    """`out = f(x Kᵀ) V`: attention over learned parameter tokens.

    Args:
        config: config of the model.
        role: query, key, value, output or ffn.
    """

    def __init__(self, config: TokenFormerConfig, role: str) -> None:
        super().__init__()
        tokens, inner = config.tokens[role], config.num_attention_heads * config.head_dim
        d_in = inner if role == "output" else config.hidden_size
        d_out = config.hidden_size if role in ("output", "ffn") else inner
        self.key_param_tokens = nn.Parameter(torch.empty(tokens, d_in))
        self.value_param_tokens = nn.Parameter(torch.empty(tokens, d_out))
        self.activation = ACTIVATIONS[config.activation]
        self.tau = config.tau[role]
        self.value_std = _init_value_std(config, role)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., D_in] to [..., D_out]; norms and sums are in at least float32."""
        scores = F.linear(x, self.key_param_tokens)  # [..., N]
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        weights = self.activation(wide, self.tau).to(scores.dtype)
        return F.linear(weights, self.value_param_tokens.T)


def _init_value_std(config: TokenFormerConfig, role: str) -> float:
    """Return the initial standard deviation of the value parameter tokens of a role."""
    if config.init == "published":
        return 2 / config.num_hidden_layers / math.sqrt(config.hidden_size)
    if role in ("output", "ffn"):
        return 0.0
    return 1 / math.sqrt(GELU_POWER * config.tokens[role])


def rotary_table(positions: Tensor, channels: int, base: float) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, each [B, 1, T, R] float32, of positions [B, T].

    They are computed in every forward pass and always float32. A buffer would be cast to half
    precision with the model, and be lost on the meta device.
    """
    exponent = torch.arange(0, channels, 2, dtype=torch.float32, device=positions.device)
    frequencies = 1.0 / base ** (exponent / max(channels, 1))  # [R / 2]
    angles = (positions.float()[:, None, :, None] * frequencies).repeat(1, 1, 1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first R channels of each head of x [B, H, T, C], in at least float32."""
    cos, sin = table
    channels = cos.shape[-1]
    if channels == 0:
        return x
    head = x[..., :channels].to(torch.promote_types(x.dtype, cos.dtype))
    first, second = head.chunk(2, dim=-1)
    rotated = head * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((rotated.to(x.dtype), x[..., channels:]), dim=-1)


def visible_keys(
    mask: Tensor | None, past: int, length: int, device: torch.device
) -> Tensor | None:
    """Return the attention mask of the T new tokens after `past` cached ones.

    Args:
        mask: padding mask [B, S]; None: no padding.
        past: number of cached tokens.
        length: number of new tokens T.
        device: device of the result.

    Returns:
        A bool mask [T, S], or [B, 1, T, S] with padding; None if the causal flag is sufficient.
    """
    if mask is None and (past == 0 or length == 1):
        return None
    causal = torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)
    if mask is None:
        return causal
    # A padding token attends to itself, because a query without keys would be NaN.
    return causal & mask.bool()[:, None, None, :] | causal.triu(past)


class Attention(nn.Module):
    """Causal self-attention with Pattention projections."""

    def __init__(self, config: TokenFormerConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.head_dim = layer, config.num_attention_heads, config.head_dim
        self.query = Pattention(config, "query")
        self.key = Pattention(config, "key")
        self.value = Pattention(config, "value")
        self.output = Pattention(config, "output")

    def forward(
        self, x: Tensor, table: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        """Map x [B, T, D] to [B, T, D]; with a cache, new tokens also attend to cached ones."""
        batch, length, _ = x.shape
        query, key, value = (
            projection(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )  # [B, H, T, C]
        query, key = rotate(query, table), rotate(key, table)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None and length > 1
        )
        out: Tensor = self.output(mixed.transpose(1, 2).reshape(batch, length, -1))
        return out


class Block(GradientCheckpointingLayer):
    """`x += attention(norm(x)); x += ffn(norm(x))`, with norms without affine parameters."""

    def __init__(self, config: TokenFormerConfig, layer: int) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.attention = Attention(config, layer)
        self.ffn = Pattention(config, "ffn")

    def forward(
        self,
        x: Tensor,
        table: tuple[Tensor, Tensor],
        mask: Tensor | None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """Map x [B, T, D] to [B, T, D]."""
        normed = F.layer_norm(x, x.shape[-1:], eps=self.eps)
        x = x + self.attention(normed, table, mask, past_key_values)
        out: Tensor = x + self.ffn(F.layer_norm(x, x.shape[-1:], eps=self.eps))
        return out


class TokenFormerPreTrainedModel(PreTrainedModel):
    """Properties of the architecture for transformers."""

    config_class = TokenFormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise the weights of one module by `config.init`."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, 0.0, INIT_STD)
        elif isinstance(module, Pattention):
            nn.init.normal_(module.key_param_tokens, 0.0, INIT_STD)
            nn.init.normal_(module.value_param_tokens, 0.0, module.value_std)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class TokenFormerModel(TokenFormerPreTrainedModel):
    """Model from token ids to hidden states after the final norm."""

    def __init__(self, config: TokenFormerConfig) -> None:
        super().__init__(config)
        self.embedding: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.final_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.embedding = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Return the hidden states of T new tokens, given as ids or as embeddings.

        Args:
            input_ids: token ids [B, T] int64.
            attention_mask: [B, S], zero for padding tokens, which may be on either side.
            position_ids: positions [B, T]; by default padding is not counted.
            past_key_values: cache of the previous tokens; the T new ones are appended.
            inputs_embeds: embeddings [B, T, D], in place of ids.
            use_cache: whether to return a cache; by default that of the config, but never with
                gradient checkpointing.
            output_hidden_states: whether to return the hidden states before each block too; by
                default that of the config.
            return_dict: whether to return an object, not a tuple; by default that of the config.

        Raises:
            ValueError: both ids and embeddings are given, or neither, or the mask has another
                shape.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        # With checkpointing the backward pass runs a block again, and would append to it twice.
        checkpointing = self.training and any(b.gradient_checkpointing for b in self.blocks)
        if past_key_values is None and _or(use_cache, self.config.use_cache) and not checkpointing:
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        attention_mask = _padding(attention_mask, x.shape[0], past + x.shape[1])
        if position_ids is None:
            position_ids = _positions(attention_mask, past, x)
        table = rotary_table(position_ids, self.config.rotary_channels, self.config.rotary_base)
        mask = visible_keys(attention_mask, past, x.shape[1], x.device)
        keep_states = _or(output_hidden_states, self.config.output_hidden_states)
        states = []
        for block in self.blocks:
            states += [x] if keep_states else []
            x = block(x, table, mask, past_key_values=past_key_values)
        x = self.final_norm(x)
        hidden_states = (*states, x) if keep_states else None
        output = BaseModelOutputWithPast(x, past_key_values, hidden_states=hidden_states)
        return output if _or(return_dict, self.config.return_dict) else output.to_tuple()


class TokenFormerForCausalLM(TokenFormerPreTrainedModel, GenerationMixin):
    """Model from token ids to logits of the next token at every position."""

    # transformers 5 reads keys and values, transformers 4 only the keys.
    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: TokenFormerConfig) -> None:
        super().__init__(config)
        self.model = TokenFormerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return logits [B, T, V], and the loss if there are labels.

        `labels` are the target ids [B, T] int64, which the loss shifts; -100 is ignored.
        `logits_to_keep` is the number of last positions, or the positions, of the logits; 0: all.
        `kwargs` are arguments of the loss, for example `num_items_in_batch` of the Trainer. The
        other arguments are those of `TokenFormerModel`.
        """
        inputs = input_ids, attention_mask, position_ids, past_key_values, inputs_embeds
        output = self.model(*inputs, use_cache, output_hidden_states, return_dict=True)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            size = self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **kwargs)
        result = CausalLMOutputWithPast(
            loss, logits, output.past_key_values, hidden_states=output.hidden_states
        )
        return result if _or(return_dict, self.config.return_dict) else result.to_tuple()


def _or(value: bool | None, default: bool | None) -> bool | None:
    return default if value is None else value


def _padding(mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """Check the shape of a padding mask, and return it if it masks any token."""
    if mask is None:
        return None
    if mask.shape != (batch, length):
        raise ValueError(
            f"attention_mask must have shape [{batch}, {length}], one entry per sequence and per "
            f"token, cached ones included, got {list(mask.shape)}."
        )
    return None if bool(mask.all()) else mask


def _positions(mask: Tensor | None, past: int, x: Tensor) -> Tensor:
    """Return the number of tokens before each one without padding, [B, T] or [1, T] int64."""
    if mask is None:
        return torch.arange(past, past + x.shape[1], device=x.device)[None]
    return (mask.long().cumsum(dim=-1) - 1).clamp_min(0)[:, past:]
