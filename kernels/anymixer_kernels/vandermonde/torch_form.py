"""The Vandermonde matrix by the addition theorem: places l = c * coarse + f, so that

    sum_d cos(x_d l) = sum_d cos(x_d c coarse) cos(x_d f) - sin(x_d c coarse) sin(x_d f)

is a matrix product of two small tables per token. About 2 sqrt(length) sines and cosines take the place of length.
"""

import math

import torch
from torch import Tensor

from anymixer_kernels.sequences import places, same_sequence


def vandermonde_block(row_angles: Tensor, column_angles: Tensor, sequence_id: Tensor | None) -> Tensor:
    """M[t,l] = sum_d cos(row[t,d] l) - cos(column[l,d] t): [batch, nheads, length, qk_dim] twice ->
    [batch, nheads, length, length]."""
    by_row, by_column = _summed_cosines(row_angles), _summed_cosines(column_angles)
    if sequence_id is None:
        return by_row - by_column.transpose(-1, -2)
    index = places(sequence_id)[:, None, None]
    by_row, by_column = (table.gather(-1, index.expand_as(table)) for table in (by_row, by_column))
    return torch.where(same_sequence(sequence_id), by_row - by_column.transpose(-1, -2), 0.0)


def _summed_cosines(angles: Tensor) -> Tensor:
    """sum_d cos(angles[..., d] * l) for l = 0 .. length-1: [..., length, qk_dim] -> [..., length, length]."""
    length = angles.shape[-2]
    coarse = math.isqrt(length - 1) + 1
    steps = torch.arange(coarse, device=angles.device, dtype=angles.dtype)
    fine_angles = angles[..., None, :] * steps[:, None]
    coarse_angles = fine_angles * coarse
    left = torch.cat([torch.cos(coarse_angles), -torch.sin(coarse_angles)], dim=-1)
    right = torch.cat([torch.cos(fine_angles), torch.sin(fine_angles)], dim=-1)
    return (left @ right.transpose(-1, -2)).flatten(-2)[..., :length]
