"""Mixing by the real part of Vandermonde matrices with unit-modulus nodes, one per row and one per column:

    M[t,l] = sum_d cos(2 pi frequency q[t,d] l) - cos(2 pi frequency k[l,d] t)

with t and l counted from the start of the sequence (Hydra, arXiv 2407.09941, as its published code has it).
"""

import math

import torch
from torch import Tensor

from anymixer_kernels.backend import current_backend
from anymixer_kernels.blockwise import mix_in_blocks, wide
from anymixer_kernels.vandermonde.reference import vandermonde_matrix
from anymixer_kernels.vandermonde.torch_form import vandermonde_block

__all__ = ["vandermonde_matrix", "vandermonde_mix"]


def vandermonde_mix(q: Tensor, k: Tensor, v: Tensor, frequency: float, sequence_id: Tensor | None = None) -> Tensor:
    """Y = M V.

    q, k: [batch, length, nheads, qk_dim]. v: [batch, length, nheads, headdim]. sequence_id: [batch, length], -1
    for padding; tokens of different sequences do not mix, and each sequence counts its own places. Returns v's
    shape and dtype.
    """
    if current_backend() == "reference":
        return torch.einsum("bhtl,blhp->bthp", vandermonde_matrix(q, k, frequency, sequence_id).to(v.dtype), v)
    angles = [2 * math.pi * frequency * wide(t).transpose(1, 2) for t in (q, k)]
    return mix_in_blocks(vandermonde_block, angles, v, sequence_id)
