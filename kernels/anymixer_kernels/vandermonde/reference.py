"""The definition of the Vandermonde mixing matrix, exact in float64."""

import math

import torch
from torch import Tensor

from anymixer_kernels.blockwise import wide
from anymixer_kernels.sequences import places, same_sequence


def vandermonde_matrix(q: Tensor, k: Tensor, frequency: float, sequence_id: Tensor | None = None) -> Tensor:
    """M of the package's docstring, [batch, nheads, length, length]; arguments as in `vandermonde_mix`."""
    index = torch.arange(q.shape[1], device=q.device)[None] if sequence_id is None else places(sequence_id)
    index = index[:, None].to(wide(q).dtype)
    turn = 2 * math.pi * frequency
    matrix = torch.zeros((), dtype=wide(q).dtype, device=q.device)
    for row, column in zip(wide(q).transpose(1, 2).unbind(-1), wide(k).transpose(1, 2).unbind(-1)):
        matrix = matrix + torch.cos(turn * row[..., :, None] * index[..., None, :])
        matrix = matrix - torch.cos(turn * column[..., None, :] * index[..., :, None])
    return matrix if sequence_id is None else torch.where(same_sequence(sequence_id), matrix, 0.0)
