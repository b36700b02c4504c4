"""Mixing by the real part of Vandermonde matrices with unit-modulus nodes, one per row and one per column:

    M[t,l] = sum_d cos(2 pi frequency q[t,d] l) - cos(2 pi frequency k[l,d] t)

with t and l counted from the start of the sequence (Hydra, arXiv 2407.09941, as its published code has it).
"""

import math

import torch
from torch import Tensor

from anymixer_kernels.backend import current_backend, takes_triton
from anymixer_kernels.blockwise import mix_in_blocks, wide
from anymixer_kernels.row_scale import finish_rows
from anymixer_kernels.vandermonde.reference import vandermonde_matrix
from anymixer_kernels.vandermonde.torch_form import vandermonde_block

__all__ = ["vandermonde_matrix", "vandermonde_mix"]


def vandermonde_mix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    frequency: float,
    sequence_id: Tensor | None = None,
    *,
    scale: Tensor | float = 1.0,
    residual: bool = False,
) -> Tensor:
    """Y = scale * M V, and + V with `residual`.

    q, k: [batch, length, nheads, qk_dim]. v: [batch, length, nheads, headdim]. sequence_id: [batch, length], -1
    for padding; tokens of different sequences do not mix, and each sequence counts its own places. scale: a number or,
    row by row, [batch, length]; it gets no gradient. Returns v's shape and dtype.
    """
    if takes_triton(v, "Vandermonde mixing"):
        from anymixer_kernels.vandermonde.triton_form import vandermonde_triton

        return vandermonde_triton(q, k, v, frequency, sequence_id, scale, residual)
    if current_backend() == "reference":
        mixed = torch.einsum("bhtl,blhp->bthp", vandermonde_matrix(q, k, frequency, sequence_id).to(v.dtype), v)
    else:
        angles = [2 * math.pi * frequency * wide(t).transpose(1, 2) for t in (q, k)]
        mixed = mix_in_blocks(vandermonde_block, angles, v, sequence_id)
    return finish_rows(mixed, v, scale, residual)
