"""Launches of the decoding kernels: one token through the blocks of a model.

Shapes: `B` rows of a batch, `D` width, `E` width of an output, `N` parameter tokens, `G` layers
that read the same input, `H` heads, `C` head dim, `R` rotated channels, `S` slots of the cache.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from tokengrow.kernels.limits import (
    MAX_DECODE_BATCH,
    MAX_DECODE_HEAD_DIM,
    MAX_DECODE_WIDTH,
    MAX_GROUP,
)
from tokengrow.kernels.reference import Operands
from tokengrow.kernels.triton_decode import attention_kernel, scores_kernel, values_kernel
from tokengrow.kernels.triton_rows import ACTIVATION_CODES, is_interpreted

# Sizes of tiles and splits, chosen by measurement: docs/results/kernel-log.md. They must not change
# during the life of a `DecodeStep`.
SCORES_TILE, MAX_SCORES_ROWS, SCORES_WARPS = 32768, 16, 4
"""Bytes of K in a tile, of which a program loads two ahead; its maximum rows; warps."""
SCORES_PROGRAMS = 264
"""Maximum programs for scores, two for each of 132 processors: each adds up the input."""
VALUES_TILE, VALUES_WARPS = 8192, 4
"""Bytes of V in a tile, of which a program loads two ahead; warps."""
VALUES_SPLITS = {"qkv": (64, 6), "output": (32, 8), "ffn": (32, 11)}
"""Columns of a program, and partial sums over the rows.

Every program of the next kernel adds all partial sums, except those of q, k and v.
"""
SPLITS, SLOTS, ATTENTION_WARPS = 4, 64, 4
"""Maximum splits of the cache of a head; slots per read; warps."""


def overlaps(device: torch.device) -> bool:
    """Return whether a kernel starts before the previous one has ended, to load weights early.

    CUDA calls this programmatic dependent launch. It needs Hopper or newer.
    """
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return hopper and not is_interpreted()


def scores_tile(n: int, width: int, layers: int, size: int) -> tuple[int, int, int]:
    """Return ROWS and BLOCK of a tile, and programs per layer, for N parameter tokens.

    All programs process the same number of tiles, several each, so that the input is added up less
    often.

    Args:
        n: N.
        width: D.
        layers: G.
        size: bytes of an element.
    """
    block = triton.next_power_of_2(width)
    rows = max(1, min(MAX_SCORES_ROWS, SCORES_TILE // (size * block)))
    tiles = triton.cdiv(n, rows)
    return rows, block, triton.cdiv(tiles, triton.cdiv(tiles * layers, SCORES_PROGRAMS))


class DecodeStep:
    """Decoding step: one token of each row of a batch through the blocks, in order.

    Memory is allocated once, and a step only launches kernels, so a CUDA graph can capture it.

    Args:
        batch: B, at most MAX_DECODE_BATCH.
        width: D of the residual stream.
        heads: H.
        head_dim: C.
        tokens: maximum parameter tokens of a layer.
        activation: a key of `ACTIVATION_CODES`.
        device: device of all tensors.
    """

    def __init__(
        self,
        batch: int,
        width: int,
        heads: int,
        head_dim: int,
        tokens: int,
        activation: str,
        device: torch.device,
    ) -> None:
        inner = heads * head_dim
        assert batch <= MAX_DECODE_BATCH and max(width, inner) <= MAX_DECODE_WIDTH
        assert head_dim <= MAX_DECODE_HEAD_DIM
        self.batch, self.heads, self.head_dim, self.tokens = batch, heads, head_dim, tokens
        self.activation = ACTIVATION_CODES[activation]

        def floats(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        max_partials = max(partials for _, partials in VALUES_SPLITS.values())
        self._streams = floats(2, batch, width).unbind()
        self._scores = floats(MAX_GROUP, batch, tokens)
        self._stats = floats(2 * MAX_GROUP * batch * SCORES_PROGRAMS)
        self._partials = floats(MAX_GROUP * max_partials * batch * max(width, inner))
        self._split_outs = floats(SPLITS, batch, inner)
        self._split_stats = floats(2, SPLITS, batch, heads)
        self._launch_options: dict[str, Any] = {"OVERLAP": overlaps(device)}
        if self._launch_options["OVERLAP"]:
            self._launch_options["launch_pdl"] = True

    def begin(self, x: Tensor, start: Tensor | None = None) -> None:
        """Set the residual stream before the first block.

        The PyTorch kernel that writes `x` must come after those that write slot, start, table and
        caches.

        Args:
            x: [B, D].
            start: [B] int64, slot in which each text starts; None: all start in the first slot.
        """
        self._x, self._start, self._pending = x.contiguous(), start, 0

    def block(
        self,
        attention: Sequence[Operands],
        output: Operands,
        ffn: Operands,
        eps: float,
        keys: Tensor,
        values: Tensor,
        slot: Tensor,
        table: tuple[Tensor, Tensor],
    ) -> None:
        """Apply a block to the residual stream.

        Args:
            attention: layers of query, key and value.
            output: output layer of attention.
            ffn: feed-forward layer.
            eps: epsilon of both norms.
            keys: [B, H, S, C] cached keys of the block; the key of the token is stored in its slot.
            values: [B, H, S, C] cached values; the value of the token is stored in its slot.
            slot: [1] int64, slot of the token in the cache.
            table: cosines and sines of all positions, [S, R] float32.
        """
        self._pattention(attention, "qkv", eps, slot)
        self._attend(keys, values, slot, table)
        self._pattention([output], "output", eps, slot)
        self._pattention([ffn], "ffn", eps, slot)

    def end(self) -> Tensor:
        """Return the residual stream [B, D] after the last block, float32."""
        shape = self._pending, *self._x.shape
        return self._x + self._partials[: math.prod(shape)].view(shape).sum(0)

    def _pattention(self, layers: Sequence[Operands], role: str, eps: float, slot: Tensor) -> None:
        """Compute partial sums of layers, of the normed stream or the output of attention."""
        from_attention, count = role == "output", len(layers)
        keys, values, taus = zip(*layers, *[layers[0]] * (MAX_GROUP - count), strict=True)
        sizes = [len(key) for key in keys]
        (_, width), out, size = keys[0].shape, values[0].shape[1], keys[0].element_size()
        rows, block, programs = scores_tile(max(sizes), width, count, size)
        shared = {
            "B": self.batch,
            "G": count,
            "N": self.tokens,
            "ACTIVATION": self.activation,
            "EXACT": keys[0].dtype == torch.float32,
            **self._launch_options,
        }
        x_next = self._streams[self._x is self._streams[0]]
        scores_kernel[(self.batch * programs, count)](
            self._x,
            self._partials,
            x_next,
            self._split_outs,
            self._split_stats,
            slot,
            *keys,
            self._scores,
            self._stats,
            *sizes,
            eps,
            D=width,
            FROM_ATTENTION=from_attention,
            PARTIALS=0 if from_attention else self._pending,
            C=self.head_dim,
            GROUP=math.gcd(self.head_dim, 8),
            SPLITS=SPLITS,
            SLOTS=self._slots_per_read(),
            ROWS=rows,
            BLOCK=block,
            num_warps=SCORES_WARPS,
            **shared,
        )
        if self._pending and not from_attention:
            self._x = x_next
        columns, self._pending = VALUES_SPLITS[role]
        values_kernel[(self.batch * triton.cdiv(out, columns), self._pending, count)](
            self._scores,
            self._stats,
            *values,
            self._partials,
            *sizes,
            *taus,
            E=out,
            P=programs,
            P_BLOCK=triton.next_power_of_2(programs),
            PARTIALS=self._pending,
            ROWS=VALUES_TILE // (size * columns),
            COLUMNS=columns,
            num_warps=VALUES_WARPS,
            **shared,
        )

    def _attend(
        self, keys: Tensor, values: Tensor, slot: Tensor, table: tuple[Tensor, Tensor]
    ) -> None:
        """Compute attention outputs of the splits, from the partial sums of query, key, value."""
        block = triton.next_power_of_2(self.head_dim)
        attention_kernel[(self.batch * self.heads, SPLITS)](
            self._partials,
            *table,
            slot,
            self._start,
            keys,
            values,
            self._split_outs,
            self._split_stats,
            self.head_dim**-0.5,
            keys.shape[2],
            H=self.heads,
            C=self.head_dim,
            R=table[0].shape[1],
            B=self.batch,
            PARTIALS=self._pending,
            SPLITS=SPLITS,
            SLOTS=self._slots_per_read(),
            BLOCK=block,
            PADDED=self._start is not None,
            num_warps=max(1, min(ATTENTION_WARPS, ATTENTION_WARPS * block // 128)),
            **self._launch_options,
        )
        self._pending = 0  # the kernel has read the partial sums of q, k and v

    def _slots_per_read(self) -> int:
        """Return the slots of the cache per read: fewer for long heads."""
        head_block: int = triton.next_power_of_2(self.head_dim)
        return SLOTS * 128 // max(128, head_block)
