"""The definition of the low-rank matrix, exact in float64."""

import torch
from torch import Tensor

from anymixer_kernels.sequences import same_sequence


def low_rank_matrix(q: Tensor, k: Tensor, sequence_id: Tensor | None = None) -> Tensor:
    """M of the package's docstring, [batch, nheads, length, length]; arguments as in `low_rank_mix`."""
    return low_rank_block(q.transpose(1, 2), k.transpose(1, 2), sequence_id)


def low_rank_block(q: Tensor, k: Tensor, sequence_id: Tensor | None) -> Tensor:
    """M of factors [batch, nheads, length, qk_dim]."""
    matrix = q @ k.transpose(-1, -2)
    return matrix if sequence_id is None else torch.where(same_sequence(sequence_id), matrix, 0.0)
