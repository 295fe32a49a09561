"""Decoding one token at a time, as fast as the weights can be read.

One token needs every weight once and computes next to nothing with it: what can be lost is the time
between the reads. So a step has fixed shapes and never waits for the CPU; on a GPU it is captured
once in a CUDA graph and replayed for every token. For a few rows it is seven Triton kernels a
block; else it is plain PyTorch. The manner is gpt-fast's (github.com/pytorch-labs/gpt-fast).

Texts of different lengths are padded on the left: all end in the same slot of the cache, and each
has positions of its own, counted from the slot in which it starts.

Shapes: `B` batch, `T` sequence, `S` cached sequence, `D` width, `H` heads, `C` head dim, `R`
rotated channels, `L` layers, `V` vocabulary.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeGuard, cast

import torch
from torch import Tensor

from tokengrow.kernels.cuda_graph import capture_cuda_graph
from tokengrow.kernels.limits import (
    MAX_DECODE_BATCH,
    MAX_DECODE_HEAD_DIM,
    MAX_DECODE_WIDTH,
    TRITON_DTYPES,
)
from tokengrow.model.rotary import rotary_table, rotate
from tokengrow.model.tokenformer import (
    Attention,
    Block,
    KVCache,
    LanguageModel,
    PattentionBlock,
    TokenFormer,
    pattention_layers,
)

if TYPE_CHECKING:
    from tokengrow.kernels.triton_step import DecodeStep


class Place(NamedTuple):
    """Position of a token in its text; the same for all layers."""

    slot: Tensor
    """[1] int64, of the cache."""
    table: tuple[Tensor, Tensor]
    """Cosines and sines of its position, float32 [1, R], or [B, 1, 1, R] with padding."""
    hidden: Tensor
    """Slots that it does not attend to, bool [S], or [B, 1, 1, S] with padding."""


def block_step(block: Block, x: Tensor, keys: Tensor, values: Tensor, place: Place) -> Tensor:
    """Apply a block to one token of each row.

    Args:
        block: the block.
        x: [B, D].
        keys: [B, H, S, C] of the block's layer; the token's own is written into its slot.
        values: [B, H, S, C], likewise.
        place: of the token.

    Returns:
        [B, D].
    """
    x = x + _attend(block.attention, block.attention_norm(x), keys, values, place)
    return x + block.ffn(block.ffn_norm(x))


def _attend(attention: Attention, x: Tensor, keys: Tensor, values: Tensor, place: Place) -> Tensor:
    shape = (x.shape[0], attention.heads, 1, attention.head_dim)
    query, key, value = (each.view(shape) for each in attention.project_token(x))  # [B, H, 1, C]
    query, key = rotate(query, place.table), rotate(key, place.table)
    keys.index_copy_(2, place.slot, key.to(keys))
    values.index_copy_(2, place.slot, value.to(values))
    # Spelled out: for one query under a mask the kernels of scaled_dot_product_attention use few of
    # the GPU's processors.
    scores = (query.to(keys) @ keys.mT).to(torch.promote_types(keys.dtype, torch.float32))
    scores = scores * attention.head_dim**-0.5  # [B, H, 1, S]
    weights = scores.masked_fill(place.hidden, -torch.inf).softmax(dim=-1).to(values.dtype)
    return attention.output((weights @ values).flatten(1))


def takes_kernels(model: LanguageModel, batch: int) -> TypeGuard[TokenFormer]:
    """Whether the Triton kernels decode this many texts with this model."""
    weight = model.embedding.weight
    if not weight.is_cuda or weight.dtype not in TRITON_DTYPES:
        return False
    return isinstance(model, TokenFormer) and _suits_kernels(model, batch)


def _suits_kernels(model: TokenFormer, batch: int) -> bool:
    config = model.config
    layers = [layer for block in model.blocks for _, layer in pattention_layers(block)]
    return (
        batch <= MAX_DECODE_BATCH
        and max(config.width, config.inner_dim) <= MAX_DECODE_WIDTH
        and config.head_dim <= MAX_DECODE_HEAD_DIM
        and all(layer.kernel in ("auto", "triton") for layer in layers)
        and all(w.is_contiguous() for layer in layers for w in layer.parameters())
    )


def _build_step(model: TokenFormer, batch: int) -> "DecodeStep":
    from tokengrow.kernels.triton_step import DecodeStep

    config = model.config
    most_tokens = max(n for _, n in config.tokens.items())
    sizes = config.width, config.heads, config.head_dim, most_tokens
    return DecodeStep(batch, *sizes, config.activation, model.embedding.weight.device)


class Decoder:
    """Decoder of a batch of texts, one token at a time.

    The step in plain PyTorch attends to the full capacity under a mask: one shape, so one graph
    for all slots. Empty slots are read too: at 1.5b a quarter of a megabyte each, compared
    with three gigabytes of weights. The kernels read none of them.

    Args:
        model: in eval mode. Its weights may change in place; a graph sees no other change.
        batch: B.
        capacity: the most tokens of a text, its padding included, S.
    """

    def __init__(self, model: LanguageModel, batch: int, capacity: int) -> None:
        config, weight = model.config, model.embedding.weight
        device = weight.device
        self.model = model
        self.cache = KVCache(config, batch, capacity, weight.dtype, device)
        # The mask gives empty slots the weight 0, but 0 times the NaN of fresh memory is NaN.
        self.cache.values.zero_()
        self._table = rotary_table(0, capacity, config.rotary_channels, config.rotary_base, device)
        self._all_slots = torch.arange(capacity, device=device)
        self._slot = torch.zeros(1, dtype=torch.int64, device=device)
        self._token = torch.zeros(batch, dtype=torch.int64, device=device)
        self._kernels = _build_step(model, batch) if takes_kernels(model, batch) else None
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def prefill(self, ids: Tensor, start: Tensor | None = None) -> Tensor:
        """Begins new texts with their prompts.

        Args:
            ids: [B, T] int64, T >= 1.
            start: [B] int64, column in which each prompt starts, after its padding, which may be
                any ids; None: there is no padding.

        Returns:
            [B, V] logits of the next token.

        Raises:
            ValueError: prompts longer than the capacity.
        """
        self.cache.length = 0
        self._take_start(start)
        logits = self.model.logits(self.model.hidden_states(ids, self.cache)[:, -1])
        self._slot.fill_(self.cache.length)
        return logits

    def _take_start(self, start: Tensor | None) -> None:
        held = self.cache.start
        if start is not None and held is not None:
            held.copy_(start)
        elif start is not held:  # padding or none, unlike before: another graph
            self.cache.start, self._graph = None if start is None else start.clone(), None

    @torch.no_grad()
    def step(self, token: Tensor) -> Tensor:
        """Append a token to each text.

        Args:
            token: [B] int64.

        Returns:
            [B, V] logits of the next token; on a GPU the next step overwrites them.

        Raises:
            ValueError: the cache is full.
        """
        full = self.cache.capacity
        if self.cache.length == full:
            raise ValueError(f"The KV cache must hold {full + 1} tokens, but has {full} slots.")
        self._token.copy_(token)
        if not self._token.is_cuda:
            logits = self._compute()
        else:
            if self._graph is None:
                self._graph, self._logits = self._capture()
            self._graph.replay()
            logits = self._logits
        self.cache.length += 1
        return logits

    def _compute(self) -> Tensor:
        """Return logits [B, V] after the token in the slot, and advance the slot by one."""
        model = self.model
        x = model.embedding(self._token)  # [B, D]
        x = self._through_blocks(x) if self._kernels is None else self._through(self._kernels, x)
        logits = model.logits(model.final_norm(x))
        self._slot.add_(1)
        return logits

    def _through_blocks(self, x: Tensor) -> Tensor:
        """Return [B, D] after the last block, in plain PyTorch."""
        place = self._place()
        for block, keys, values in self._layers():
            x = block_step(block, x, keys, values, place)
        return x

    def _place(self) -> Place:
        slot, start, (cos, sin) = self._slot, self.cache.start, self._table
        if start is None:
            table = cos.index_select(0, slot), sin.index_select(0, slot)
            return Place(slot, table, self._all_slots > slot)
        cos, sin = (each[slot - start, None, None] for each in (cos, sin))
        hidden = (self._all_slots > slot) | (self._all_slots < start[:, None])
        return Place(slot, (cos, sin), hidden[:, None, None])

    def _through(self, kernels: "DecodeStep", x: Tensor) -> Tensor:
        """Return [B, D] after the last block, from the kernels."""
        kernels.begin(x, self.cache.start)
        for block, keys, values in self._layers():
            block = cast(PattentionBlock, block)
            layers = block.attention
            attention = [layer.operands for layer in (layers.query, layers.key, layers.value)]
            output, ffn = layers.output.operands, block.ffn.operands
            place = self._slot, self._table
            kernels.block(attention, output, ffn, block.ffn_norm.eps, keys, values, *place)
        return kernels.end().to(x)

    def _layers(self) -> Iterator[tuple[Block, Tensor, Tensor]]:
        """Yield the blocks with their part of the cache."""
        blocks = cast(Iterable[Block], self.model.blocks)
        return zip(blocks, self.cache.keys, self.cache.values, strict=True)

    def _capture(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Return the step as a graph, and the logits that its replays fill."""
        # Each warm-up advances the slot. The reset makes the next call store the key and value of
        # the token in the same slot again.
        return capture_cuda_graph(
            self._compute,
            self._token.device,
            warm_ups=2,
            after_warm_up=lambda: self._slot.fill_(self.cache.length),
        )
