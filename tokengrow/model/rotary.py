"""Rotary position embedding on the first channels of each head, half-split.

RoFormer, arXiv 2104.09864; the half-split layout and the partial rotation are those of GPT-NeoX.

Shapes: `B` batch, `H` heads, `T` sequence, `C` head dim, `R` rotated channels.
"""

import torch
from torch import Tensor


def rotary_table(
    start: int | Tensor, length: int, channels: int, base: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of positions start .. start + length - 1.

    The table is always float32, because a half-precision table changes the logits visibly.

    Args:
        start: first position of all texts, or [B] int64 of each text.
        length: T.
        channels: R.
        base: base of the frequencies.
        device: device of the table.

    Returns:
        cos and sin float32, each [T, R], or [B, T, R] if each text has its own start.
    """
    exponent = torch.arange(0, channels, 2, dtype=torch.float32, device=device) / max(channels, 1)
    frequencies = 1.0 / base**exponent  # [R / 2]
    steps = torch.arange(length, device=device)
    positions = (start[:, None] if isinstance(start, Tensor) else start) + steps
    half = positions.to(torch.float32)[..., None] * frequencies
    angles = torch.cat((half, half), dim=-1)  # [T, R] or [B, T, R]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first R channels of each head.

    Args:
        x: [B, T, H, C].
        table: cos and sin float32, [T, 1, R] or another shape that broadcasts to x.

    Returns:
        [B, T, H, C] in the dtype of x, computed in at least float32.
    """
    cos, sin = table
    channels = cos.shape[-1]
    if channels == 0:
        return x
    head = x[..., :channels].to(torch.promote_types(x.dtype, cos.dtype))
    first, second = head.chunk(2, dim=-1)
    rotated = head * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((rotated.to(x.dtype), x[..., channels:]), dim=-1)
