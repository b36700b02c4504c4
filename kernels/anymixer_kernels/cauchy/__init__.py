"""Mixing by a Cauchy matrix in its positive form, summed over the dimensions of queries and keys:

    M[t,l] = sum_d 1 / (exp(q[t,d]) + exp(k[l,d]) + shift)

(Hydra, arXiv 2407.09941, section 2.2, writes 1 / (q - k + c); its published code, and so this op, exponentiates.)
"""

import torch
from torch import Tensor

from anymixer_kernels.backend import current_backend
from anymixer_kernels.blockwise import mix_in_blocks, wide
from anymixer_kernels.cauchy.reference import cauchy_matrix, sum_of_reciprocals

__all__ = ["cauchy_matrix", "cauchy_mix"]


def cauchy_mix(q: Tensor, k: Tensor, v: Tensor, shift: Tensor, sequence_id: Tensor | None = None) -> Tensor:
    """Y = M V.

    q, k: [batch, length, nheads, qk_dim]. v: [batch, length, nheads, headdim]. shift: scalar, at least 0.
    sequence_id: [batch, length], -1 for padding; tokens of different sequences do not mix. Returns v's shape and
    dtype.
    """
    if current_backend() == "reference":
        return torch.einsum("bhtl,blhp->bthp", cauchy_matrix(q, k, shift, sequence_id).to(v.dtype), v)
    rows, columns = torch.exp(wide(q)) + wide(shift), torch.exp(wide(k))
    return mix_in_blocks(sum_of_reciprocals, [rows.transpose(1, 2), columns.transpose(1, 2)], v, sequence_id)
