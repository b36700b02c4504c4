"""The gated norm that keeps its two inputs alone for the backward pass.

Autograd would keep five float32 tensors of their size, more than the rest of a mixer's block together; here both
passes go through the rows in blocks, in float32, and keep nothing but the result.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from anymixer_kernels.blockwise import wide

# Entries worked on at once: about a core's cache on a CPU; on a GPU what keeps its memory free.
BLOCK_ENTRIES = {"cpu": 2**17, "cuda": 2**24}


class GatedNorm(torch.autograd.Function):
    """See `anymixer_kernels.gated_norm.gated_norm`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x, gate: [..., width]; weight: [width]."""
        ctx.save_for_backward(x, gate, weight)
        ctx.eps = eps
        rows, gates = x.reshape(-1, x.shape[-1]), gate.reshape(-1, x.shape[-1])
        y = torch.empty_like(rows)
        for part in _blocks(rows):
            n, _ = _normalised(rows[part], eps)
            g = wide(gates[part])
            y[part] = n.mul_(wide(weight)).mul_(torch.sigmoid(g).mul_(g)).to(y.dtype)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, gate, weight = ctx.saved_tensors
        width = x.shape[-1]
        rows, gates, grads = x.reshape(-1, width), gate.reshape(-1, width), grad_y.reshape(-1, width)
        grad_x, grad_gate = torch.empty_like(rows), torch.empty_like(gates)
        grad_weight = torch.zeros(width, dtype=wide(weight).dtype, device=x.device)
        for part in _blocks(rows):
            n, inverse_rms = _normalised(rows[part], ctx.eps)
            g, dy = wide(gates[part]), wide(grads[part])
            sigmoid = torch.sigmoid(g)
            silu = sigmoid * g
            grad_weight += (dy * silu * n).sum(0)
            weighted = dy * wide(weight)
            grad_gate[part] = (weighted * n * (sigmoid + silu - silu * sigmoid)).to(gate.dtype)
            dn = weighted.mul_(silu)
            grad_x[part] = (inverse_rms * (dn - n * (dn * n).mean(-1, keepdim=True))).to(x.dtype)
        return grad_x.view(x.shape), grad_gate.view(gate.shape), grad_weight.to(weight.dtype), None


def _normalised(rows: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """rows / rms [n, width] and 1 / rms [n, 1]."""
    rows = wide(rows)
    inverse_rms = torch.rsqrt(rows.square().mean(dim=-1, keepdim=True) + eps)
    return rows * inverse_rms, inverse_rms


def _blocks(rows: Tensor) -> Iterator[slice]:
    size = max(1, BLOCK_ENTRIES.get(rows.device.type, 2**24) // rows.shape[1])
    for start in range(0, rows.shape[0], size):
        yield slice(start, start + size)
