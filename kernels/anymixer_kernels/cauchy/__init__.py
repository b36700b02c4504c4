"""Mixing by a Cauchy matrix in its positive form, summed over the dimensions of queries and keys:

    M[t,l] = sum_d 1 / (exp(q[t,d]) + exp(k[l,d]) + shift)

(Hydra, arXiv 2407.09941, section 2.2, writes 1 / (q - k + c); its published code, and so this op, exponentiates.)
"""

import torch
from torch import Tensor

from anymixer_kernels.backend import current_backend, takes_triton
from anymixer_kernels.blockwise import mix_in_blocks, wide
from anymixer_kernels.cauchy.reference import cauchy_matrix, sum_of_reciprocals
from anymixer_kernels.row_scale import finish_rows

__all__ = ["cauchy_matrix", "cauchy_mix"]


def cauchy_mix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift: Tensor,
    sequence_id: Tensor | None = None,
    *,
    scale: Tensor | float = 1.0,
    residual: bool = False,
) -> Tensor:
    """Y = scale * M V, and + V with `residual`.

    q, k: [batch, length, nheads, qk_dim]. v: [batch, length, nheads, headdim]. shift: scalar, at least 0.
    sequence_id: [batch, length], -1 for padding; tokens of different sequences do not mix. scale: a number or, row by
    row, [batch, length]; it gets no gradient. Returns v's shape and dtype.
    """
    if takes_triton(v, "Cauchy mixing"):
        from anymixer_kernels.cauchy.triton_form import cauchy_triton

        return cauchy_triton(q, k, v, shift, sequence_id, scale, residual)
    if current_backend() == "reference":
        mixed = torch.einsum("bhtl,blhp->bthp", cauchy_matrix(q, k, shift, sequence_id).to(v.dtype), v)
    else:
        rows, columns = torch.exp(wide(q)) + wide(shift), torch.exp(wide(k))
        mixed = mix_in_blocks(sum_of_reciprocals, [rows.transpose(1, 2), columns.transpose(1, 2)], v, sequence_id)
    return finish_rows(mixed, v, scale, residual)
