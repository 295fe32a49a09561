"""The launches of `triton_decode`: one token through the blocks of a model.

Shapes: `B` rows of a batch, `D` width, `E` width of an output, `N` parameter tokens, `G` layers
that read the same input, `H` heads, `C` head dim, `R` rotated channels, `S` slots of the cache.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from tokengrow.kernels.fused import MAX_LAYERS
from tokengrow.kernels.triton_decode import attention_kernel, scores_kernel, values_kernel
from tokengrow.kernels.triton_rows import CODES, interpreted

MAX_BATCH = 4
"""B: each row of a batch reads the weights from the L2 cache anew, which is twice as fast as the
memory, so from about here on matrix products are faster."""
MAX_WIDTH, MAX_HEAD_DIM = 4096, 256
"""What a program holds at once."""

# How the work is cut, chosen by measurement: docs/results/kernel-log.md. A `Step` expects the same
# numbers as long as it lives.
SCORES_TILE, MAX_ROWS, SCORES_WARPS = 32768, 16, 4
"""Bytes of K in a tile, of which a program has two on their way; the most of its rows; warps."""
SCORES_PROGRAMS = 264
"""The most programs for scores, two for each of 132 processors: every one adds up the input."""
VALUES_TILE, VALUES_WARPS = 8192, 4
"""Bytes of V in a tile, of which a program has two on their way; warps."""
VALUES_CUTS = {"qkv": (64, 6), "output": (32, 8), "ffn": (32, 11)}
"""Columns of a program, and parts that the rows are cut into: every program of the next kernel
adds them all up, but for q, k and v."""
PIECES, SLOTS, ATTENTION_WARPS = 4, 64, 4
"""The most pieces that a head's cache is cut into; slots read at once; warps."""

Layer = tuple[Tensor, Tensor, float]
"""Key [N, D] and value [N, E] parameter tokens, and tau."""


def overlaps(device: torch.device) -> bool:
    """Whether a kernel starts before the one in front has ended, to ask for weights meanwhile.

    CUDA calls it programmatic dependent launch; Hopper is the first to have it.
    """
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return hopper and not interpreted()


def scores_tile(n: int, width: int, layers: int, size: int) -> tuple[int, int, int]:
    """ROWS and BLOCK of a tile, and programs per layer, for N tokens of elements of this size.

    A program takes several tiles, so that the input is added up less often; every one as many.
    """
    block = triton.next_power_of_2(width)
    rows = max(1, min(MAX_ROWS, SCORES_TILE // (size * block)))
    tiles = triton.cdiv(n, rows)
    return rows, block, triton.cdiv(tiles, triton.cdiv(tiles * layers, SCORES_PROGRAMS))


class Step:
    """Takes a token of each row of a batch through blocks, one after the other.

    Its memory is allocated once, and it only launches kernels, so a CUDA graph may hold it.

    Args:
        batch: B, at most MAX_BATCH.
        width: D of the residual stream.
        heads: H.
        head_dim: C.
        tokens: the most parameter tokens of a layer.
        activation: a key of `CODES`.
        device: of everything.
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
        assert batch <= MAX_BATCH and max(width, inner) <= MAX_WIDTH
        assert head_dim <= MAX_HEAD_DIM
        self.batch, self.heads, self.head_dim, self.tokens = batch, heads, head_dim, tokens
        self.activation = CODES[activation]

        def floats(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        parts = max(parts for _, parts in VALUES_CUTS.values())
        self._streams = floats(2, batch, width).unbind()
        self._scores = floats(MAX_LAYERS, batch, tokens)
        self._stats = floats(2 * MAX_LAYERS * batch * SCORES_PROGRAMS)
        self._parts = floats(MAX_LAYERS * parts * batch * max(width, inner))
        self._mixes = floats(PIECES, batch, inner)
        self._tops = floats(2, PIECES, batch, heads)
        self._launching: dict[str, Any] = {"OVERLAP": overlaps(device)}
        if self._launching["OVERLAP"]:
            self._launching["launch_pdl"] = True

    def begin(self, x: Tensor, start: Tensor | None = None) -> None:
        """Takes the residual stream in front of the first block.

        The kernel of PyTorch that wrote it comes behind what wrote slot, start, table and caches.

        Args:
            x: [B, D].
            start: [B] int64, the slot in which each text starts; None: all in the first.
        """
        self._x, self._start, self._pending = x.contiguous(), start, 0

    def block(
        self,
        attention: Sequence[Layer],
        output: Layer,
        ffn: Layer,
        eps: float,
        keys: Tensor,
        values: Tensor,
        slot: Tensor,
        table: tuple[Tensor, Tensor],
    ) -> None:
        """Takes the stream through a block.

        Args:
            attention: the layers of query, key and value.
            output: the layer behind attention.
            ffn: the feed-forward layer.
            eps: of both norms.
            keys: [B, H, S, C] the block's cache; the token's own is written into its slot.
            values: [B, H, S, C], likewise.
            slot: [1] int64, of the cache.
            table: cosines and sines of all positions, [S, R] float32.
        """
        self._pattention(attention, "qkv", eps, slot)
        self._attend(keys, values, slot, table)
        self._pattention([output], "output", eps, slot)
        self._pattention([ffn], "ffn", eps, slot)

    def end(self) -> Tensor:
        """The stream [B, D] behind the last block, float32."""
        shape = self._pending, *self._x.shape
        return self._x + self._parts[: math.prod(shape)].view(shape).sum(0)

    def _pattention(self, layers: Sequence[Layer], role: str, eps: float, slot: Tensor) -> None:
        """Parts of what these layers make of the normed stream, or of what attention has mixed."""
        mixed, count = role == "output", len(layers)
        keys, values, taus = zip(*layers, *[layers[0]] * (MAX_LAYERS - count), strict=True)
        sizes = [len(key) for key in keys]
        (_, width), out, size = keys[0].shape, values[0].shape[1], keys[0].element_size()
        rows, block, programs = scores_tile(max(sizes), width, count, size)
        shared = {
            "B": self.batch,
            "G": count,
            "N": self.tokens,
            "ACTIVATION": self.activation,
            "EXACT": keys[0].dtype == torch.float32,
            **self._launching,
        }
        x_next = self._streams[self._x is self._streams[0]]
        scores_kernel[(self.batch * programs, count)](
            self._x,
            self._parts,
            x_next,
            self._mixes,
            self._tops,
            slot,
            *keys,
            self._scores,
            self._stats,
            *sizes,
            eps,
            D=width,
            MIXED=mixed,
            PARTS=0 if mixed else self._pending,
            C=self.head_dim,
            GROUP=math.gcd(self.head_dim, 8),
            PIECES=PIECES,
            SLOTS=self._slots(),
            ROWS=rows,
            BLOCK=block,
            num_warps=SCORES_WARPS,
            **shared,
        )
        if self._pending and not mixed:
            self._x = x_next
        wide, self._pending = VALUES_CUTS[role]
        values_kernel[(self.batch * triton.cdiv(out, wide), self._pending, count)](
            self._scores,
            self._stats,
            *values,
            self._parts,
            *sizes,
            *taus,
            E=out,
            P=programs,
            P_BLOCK=triton.next_power_of_2(programs),
            PARTS=self._pending,
            ROWS=VALUES_TILE // (size * wide),
            WIDE=wide,
            num_warps=VALUES_WARPS,
            **shared,
        )

    def _attend(
        self, keys: Tensor, values: Tensor, slot: Tensor, table: tuple[Tensor, Tensor]
    ) -> None:
        """Mixes of the pieces of the cache, from the parts of query, key and value."""
        block = triton.next_power_of_2(self.head_dim)
        attention_kernel[(self.batch * self.heads, PIECES)](
            self._parts,
            *table,
            slot,
            self._start,
            keys,
            values,
            self._mixes,
            self._tops,
            self.head_dim**-0.5,
            keys.shape[2],
            H=self.heads,
            C=self.head_dim,
            R=table[0].shape[1],
            B=self.batch,
            PARTS=self._pending,
            PIECES=PIECES,
            SLOTS=self._slots(),
            BLOCK=block,
            PADDED=self._start is not None,
            num_warps=max(1, min(ATTENTION_WARPS, ATTENTION_WARPS * block // 128)),
            **self._launching,
        )
        self._pending = 0  # those of q, k and v are used up

    def _slots(self) -> int:
        """Of the cache at once: fewer of long heads."""
        return SLOTS * 128 // max(128, triton.next_power_of_2(self.head_dim))
