"""Y = M X for one chunk of both directions, M[t,s] = (C[t] . B[s]) exp(row[t] + col[s]), never kept for the backward.

M has one entry per head and pair of tokens, by far the largest thing here. Plain autograd would hold eight
tensors of that size; this function holds none, builds M again in the backward pass, and works through the batch
in blocks small enough for the processor's cache.
"""

from typing import Any

import torch
from torch import Tensor

# Entries of M worked on at once: about a core's cache on a CPU; on a GPU what keeps its memory free.
BLOCK_ENTRIES = {"cpu": 2**18, "cuda": 2**25}


class DenseProduct(torch.autograd.Function):
    """Product with the matrix whose strict lower triangle is direction 0 and strict upper one direction 1."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, row: Tensor, col: Tensor, B: Tensor, C: Tensor, sequence_id: Tensor | None
    ) -> Tensor:
        """x: [batch, nheads, length, headdim]; row, col: [2, batch, nheads, length], the log-weights of readers
        and sources; B, C: [2, batch, ngroups, length, d_state]; sequence_id: [batch, length].

        Returns [batch, nheads, length, headdim] in x's dtype.
        """
        ctx.save_for_backward(x, row, col, B, C, sequence_id)
        y = torch.empty_like(x)
        for part in _blocks(x):
            weights, similar = _matrix_factors(part, row, col, B, C, sequence_id)
            y[part] = _times_groups(weights, similar).to(x.dtype) @ x[part]
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, row, col, B, C, sequence_id = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in (x, row, col, B, C)]
        for part in _blocks(x):
            _backward_block(part, grad_y, (x, row, col, B, C, sequence_id), grads)
        return (*grads, None)


def _blocks(x: Tensor) -> list[slice]:
    """Slices of the batch, each with about BLOCK_ENTRIES entries of M."""
    batch, nheads, length, _ = x.shape
    size = max(1, BLOCK_ENTRIES.get(x.device.type, 2**25) // (nheads * length * length))
    return [slice(start, min(start + size, batch)) for start in range(0, batch, size)]


def _triangle(length: int, device: torch.device) -> Tensor:
    """bool [length, length], True strictly below the diagonal."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril(-1)


def _matrix_factors(
    part: slice, row: Tensor, col: Tensor, B: Tensor, C: Tensor, sequence_id: Tensor | None
) -> tuple[Tensor, Tensor]:
    """exp(row + col) [block, nheads, length, length], zero outside sequences and on the diagonal, and C . B
    [block, ngroups, length, length]."""
    length = row.shape[-1]
    below = _triangle(length, row.device)
    forbidden = torch.eye(length, dtype=torch.bool, device=row.device)
    if sequence_id is not None:
        ids = sequence_id[part]
        forbidden = forbidden | (ids[:, :, None] != ids[:, None, :])[:, None]
    exponent = [row[d, part, :, :, None] + col[d, part, :, None, :] for d in (0, 1)]
    weights = torch.where(below, exponent[0], exponent[1]).masked_fill_(forbidden, -torch.inf).exp_()
    similar = [C[d, part] @ B[d, part].transpose(-1, -2) for d in (0, 1)]
    return weights, torch.where(below, similar[0], similar[1])


def _times_groups(heads: Tensor, groups: Tensor) -> Tensor:
    """Multiply each head of [block, nheads, l, l] by its group's entry of [block, ngroups, l, l]."""
    return (heads.unflatten(1, (groups.shape[1], -1)) * groups[:, :, None]).flatten(1, 2)


def _backward_block(part: slice, grad_y: Tensor, saved: tuple[Tensor | None, ...], grads: list[Tensor]) -> None:
    """Write one block's gradients into `grads` (of x, row, col, B, C)."""
    x, row, col, B, C, sequence_id = saved
    assert x is not None and row is not None and col is not None and B is not None and C is not None
    weights, similar = _matrix_factors(part, row, col, B, C, sequence_id)
    below = _triangle(row.shape[-1], row.device)
    grad_matrix = (grad_y[part] @ x[part].transpose(-1, -2)).to(weights.dtype)
    matrix = _times_groups(weights, similar)
    grads[0][part] = matrix.to(x.dtype).transpose(-1, -2) @ grad_y[part]

    grad_similar = weights.mul_(grad_matrix).unflatten(1, (similar.shape[1], -1)).sum(2)
    grad_exponent = matrix.mul_(grad_matrix)
    rows, cols = grad_exponent.sum(-1), grad_exponent.sum(-2)
    lower = grad_exponent.mul_(below)
    lower_rows, lower_cols = lower.sum(-1), lower.sum(-2)
    grads[1][0, part], grads[1][1, part] = lower_rows, rows - lower_rows
    grads[2][0, part], grads[2][1, part] = lower_cols, cols - lower_cols
    for d, keep in enumerate((below, below.T)):
        triangle = (grad_similar * keep).to(B.dtype)
        grads[3][d, part] = triangle.transpose(-1, -2) @ C[d, part]
        grads[4][d, part] = triangle @ B[d, part]
