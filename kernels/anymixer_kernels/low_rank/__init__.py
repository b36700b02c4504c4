"""Mixing by a matrix of rank qk_dim, linear attention without a softmax or a normalisation:

M[t,l] = q[t] . k[l]
"""

import torch
from torch import Tensor

from anymixer_kernels.backend import current_backend, takes_triton
from anymixer_kernels.low_rank.reference import low_rank_matrix
from anymixer_kernels.low_rank.torch_form import low_rank_torch
from anymixer_kernels.row_scale import finish_rows

__all__ = ["low_rank_matrix", "low_rank_mix"]

# Up to here tiles of M are cheaper on a GPU than passes over memory in a time linear in the length.
TILES_LENGTH = 1024


def low_rank_mix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequence_id: Tensor | None = None,
    *,
    scale: Tensor | float = 1.0,
    residual: bool = False,
) -> Tensor:
    """Y = scale * M V, and + V with `residual`; linear in the length where that is long.

    q, k: [batch, length, nheads, qk_dim]. v: [batch, length, nheads, headdim]. sequence_id: [batch, length], -1
    for padding; tokens of different sequences do not mix. scale: a number or, row by row, [batch, length]; it
    gets no gradient. Returns v's shape and dtype.
    """
    slower = None if v.shape[1] <= TILES_LENGTH else f"rows of more than {TILES_LENGTH:,} tokens"
    if takes_triton(v, "low-rank mixing", slower=slower):
        from anymixer_kernels.low_rank.triton_form import low_rank_triton

        return low_rank_triton(q, k, v, sequence_id, scale, residual)
    if current_backend() == "reference":
        mixed = torch.einsum("bhtl,blhp->bthp", low_rank_matrix(q, k, sequence_id).to(v.dtype), v)
    else:
        mixed = low_rank_torch(q, k, v, sequence_id)
    return finish_rows(mixed, v, scale, residual)
