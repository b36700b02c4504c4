"""The definition of the Toeplitz matrix, exact in float64."""

import torch
from torch import Tensor

from anymixer_kernels.sequences import same_sequence, starts


def toeplitz_matrix(below: Tensor, above: Tensor, batch: int, sequence_id: Tensor | None = None) -> Tensor:
    """M of the package's docstring, [batch, nheads, length, length]; arguments as in `toeplitz_mix`."""
    shared = below.dim() == 2
    if sequence_id is None or shared:
        matrix = toeplitz_from_lags(below.transpose(-1, -2), above.transpose(-1, -2), None)
        matrix = matrix.expand(batch, -1, -1, -1)
        return matrix if sequence_id is None else torch.where(same_sequence(sequence_id), matrix, 0.0)
    return toeplitz_from_lags(below.transpose(1, 2), above.transpose(1, 2), sequence_id)


def toeplitz_from_lags(below: Tensor, above: Tensor, sequence_id: Tensor | None) -> Tensor:
    """below, above: [..., nheads, length] -> [..., nheads, length, length]; with sequence_id, of one batch axis."""
    length = below.shape[-1]
    index = torch.arange(length, device=below.device)
    lag = index[:, None] - index
    if sequence_id is None:
        return torch.where(lag >= 0, below[..., lag.abs()], above[..., lag.abs()])
    # A sequence's lags stand at its own tokens; where a pair is no pair of one sequence, any lag will do.
    place = (starts(sequence_id)[:, None, :, None] + lag.abs()).clamp(max=length - 1)
    flat = place.expand(-1, below.shape[1], -1, -1).flatten(2)
    lower, upper = (lags.gather(-1, flat).unflatten(-1, (length, length)) for lags in (below, above))
    return torch.where(same_sequence(sequence_id), torch.where(lag >= 0, lower, upper), 0.0)
