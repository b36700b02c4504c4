"""Relative positions for attention: rotary embeddings and ALiBi."""

import math

import torch
from torch import Tensor


def apply_rotary(x: Tensor, theta: float, start: int = 0) -> Tensor:
    """Rotate pairs of channels by an angle proportional to the position (RoFormer, arXiv 2104.09864).

    x: [batch, heads, length, headdim], headdim even; channel i pairs with i + headdim / 2. Scores of rotated
    queries and keys depend on distances alone, so the positions may start anywhere: at `start`.
    """
    return rotate(x, torch.arange(start, start + x.shape[-2], device=x.device), theta)


def rotate(x: Tensor, places: Tensor, theta: float) -> Tensor:
    """Rotary positions at any places, negative ones too: x [..., headdim], places broadcastable to x.shape[:-1]."""
    half = x.shape[-1] // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=wide) / half)
    angle = places.to(wide)[..., None] * frequency
    cos, sin = angle.cos(), angle.sin()
    first, second = x.to(wide).split(half, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def alibi_slopes(num_heads: int) -> list[float]:
    """ALiBi's slope of each head (arXiv 2108.12409): geometric for a power of two, interleaved otherwise."""

    def geometric(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    power = 2 ** int(math.log2(num_heads))
    if power == num_heads:
        return geometric(num_heads)
    return geometric(power) + geometric(2 * power)[0::2][: num_heads - power]


def _slopes(num_heads: int, device: torch.device) -> Tensor:
    """`alibi_slopes`, float32 [num_heads], filled in on the device: a copy to it would hold up the host, and no CUDA
    graph could record it."""
    return torch.stack([torch.full((), slope, device=device) for slope in alibi_slopes(num_heads)])


def alibi_bias(
    num_heads: int, length: int, device: torch.device, dtype: torch.dtype, queries: int | None = None
) -> Tensor:
    """Symmetric ALiBi bias -slope * |i - j|: [1, num_heads, queries, length]; the last `queries` rows, None for all."""
    place = torch.arange(length, device=device)
    distance = (place[length - (queries or length) :, None] - place[None, :]).abs()
    return (-_slopes(num_heads, device)[:, None, None] * distance)[None].to(dtype)
