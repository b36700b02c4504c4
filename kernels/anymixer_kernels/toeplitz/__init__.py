"""Mixing by a Toeplitz matrix, whose entries depend on the distance of their tokens alone:

M[t,l] = below[t - l]  where t >= l,   above[l - t]  where t < l
"""

import torch
from torch import Tensor

from anymixer_kernels.backend import current_backend
from anymixer_kernels.toeplitz.reference import toeplitz_matrix
from anymixer_kernels.toeplitz.torch_form import toeplitz_torch

__all__ = ["toeplitz_matrix", "toeplitz_mix"]


def toeplitz_mix(below: Tensor, above: Tensor, v: Tensor, sequence_id: Tensor | None = None) -> Tensor:
    """Y = M V.

    below, above: the value of lag o at position o, [length, nheads] for one set of lags that serves every
    sequence, or [batch, length, nheads]; `above` is not read at 0. With sequence_id ([batch, length], -1 for
    padding) tokens of different sequences do not mix, and lag o of a sequence stands at its own token o.
    v: [batch, length, nheads, headdim]. Returns v's shape and dtype.
    """
    if current_backend() == "reference":
        matrix = toeplitz_matrix(below, above, v.shape[0], sequence_id)
        return torch.einsum("bhtl,blhp->bthp", matrix.to(v.dtype), v)
    return toeplitz_torch(below, above, v, sequence_id)
