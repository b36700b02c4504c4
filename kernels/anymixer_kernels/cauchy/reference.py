"""The definition of the Cauchy matrix, exact in float64."""

import torch
from torch import Tensor

from anymixer_kernels.blockwise import wide
from anymixer_kernels.sequences import same_sequence


def cauchy_matrix(q: Tensor, k: Tensor, shift: Tensor, sequence_id: Tensor | None = None) -> Tensor:
    """M of the package's docstring, [batch, nheads, length, length]; arguments as in `cauchy_mix`."""
    rows, columns = (torch.exp(wide(t)).transpose(1, 2) for t in (q, k))
    return sum_of_reciprocals(rows + wide(shift), columns, sequence_id)


def sum_of_reciprocals(rows: Tensor, columns: Tensor, sequence_id: Tensor | None) -> Tensor:
    """sum_d 1 / (rows[t,d] + columns[l,d]): [batch, nheads, length, qk_dim] twice -> [batch, nheads, length, length].

    One dimension at a time, so that no tensor has qk_dim times the entries of the matrix.
    """
    matrix = torch.zeros((), dtype=rows.dtype, device=rows.device)
    for row, column in zip(rows.unbind(-1), columns.unbind(-1)):
        matrix = matrix + torch.reciprocal(row[..., :, None] + column[..., None, :])
    return matrix if sequence_id is None else torch.where(same_sequence(sequence_id), matrix, 0.0)
