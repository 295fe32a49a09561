"""Rotary position embedding on the first channels of each head, half-split.

RoFormer, arXiv 2104.09864; the half-split layout and the partial rotation are GPT-NeoX's.
Shapes: `B` batch, `H` heads, `T` sequence, `C` head dim, `R` rotated channels.
"""

import torch
from torch import Tensor


def rotary_table(
    start: int | Tensor, length: int, channels: int, base: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions start .. start + length - 1.

    Always float32, whatever the model's dtype: a half-precision table moves the logits visibly.

    Args:
        start: of all texts, or [B] int64 of each.
        length: T.
        channels: R.
        base: of the frequencies.
        device: where.

    Returns:
        cos and sin float32, each [T, R], or [B, T, R] where each text has a start of its own.
    """
    exponent = torch.arange(0, channels, 2, dtype=torch.float32, device=device) / max(channels, 1)
    frequencies = 1.0 / base**exponent  # [R / 2]
    steps = torch.arange(length, device=device)
    positions = (start[:, None] if isinstance(start, Tensor) else start) + steps
    half = positions.to(torch.float32)[..., None] * frequencies
    angles = torch.cat((half, half), dim=-1)  # [T, R] or [B, T, R]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates the first R channels of each head.

    Args:
        x: [B, T, H, C].
        table: cos and sin float32, [T, 1, R] or what else broadcasts to x.

    Returns:
        [B, T, H, C] in the dtype of x; computed in at least float32.
    """
    cos, sin = table
    channels = cos.shape[-1]
    if channels == 0:
        return x
    head = x[..., :channels].to(torch.promote_types(x.dtype, cos.dtype))
    first, second = head.chunk(2, dim=-1)
    rotated = head * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((rotated.to(x.dtype), x[..., channels:]), dim=-1)
