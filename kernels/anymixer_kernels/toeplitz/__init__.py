"""Mixing by a Toeplitz matrix, whose entries depend on the distance of their tokens alone:

M[t,l] = below[t - l]  where t >= l,   above[l - t]  where t < l
"""

import torch
from torch import Tensor

from anymixer_kernels.backend import current_backend, takes_triton
from anymixer_kernels.row_scale import finish_rows
from anymixer_kernels.toeplitz.reference import toeplitz_matrix
from anymixer_kernels.toeplitz.torch_form import toeplitz_torch

__all__ = ["TILES_LENGTH", "toeplitz_matrix", "toeplitz_mix"]

# Up to here tiles on a GPU's tensor cores are taken for cheaper than Fourier transforms.
TILES_LENGTH = 2048


def toeplitz_mix(
    below: Tensor,
    above: Tensor,
    v: Tensor,
    sequence_id: Tensor | None = None,
    *,
    scale: Tensor | float = 1.0,
    residual: bool = False,
) -> Tensor:
    """Y = scale * M V, and + V with `residual`.

    below, above: the value of lag o at position o, [length, nheads] for one set of lags that serves every
    sequence, or [batch, length, nheads]; `above` is not read at 0. With sequence_id ([batch, length], -1 for
    padding) tokens of different sequences do not mix, and lag o of a sequence stands at its own token o.
    v: [batch, length, nheads, headdim]. scale: a number or, row by row, [batch, length]; it gets no gradient. Returns
    v's shape and dtype.
    """
    if current_backend() == "reference":
        matrix = toeplitz_matrix(below, above, v.shape[0], sequence_id)
        return finish_rows(torch.einsum("bhtl,blhp->bthp", matrix.to(v.dtype), v), v, scale, residual)
    by_tiles = sequence_id is not None or v.shape[1] <= TILES_LENGTH
    slower = None if by_tiles else f"rows of more than {TILES_LENGTH:,} tokens of one sequence"
    if takes_triton(v, "Toeplitz mixing", slower=slower):
        from anymixer_kernels.toeplitz.triton_form import toeplitz_triton

        return toeplitz_triton(below, above, v, sequence_id, scale, residual)
    return finish_rows(toeplitz_torch(below, above, v, sequence_id), v, scale, residual)
