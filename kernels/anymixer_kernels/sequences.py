"""Where sequences begin and which tokens share one, from `sequence_id`: [batch, length] integers, equal neighbours in
a row are one sequence, -1 is padding."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def same_sequence(sequence_id: Tensor) -> Tensor:
    """Which real tokens (last axis) share a sequence with which: bool [batch, 1, length, length]."""
    ids = sequence_id[:, None]
    return (ids[..., :, None] == ids[..., None, :]) & (ids >= 0)[..., None, :]


def continues(sequence_id: Tensor) -> Tensor:
    """Which tokens belong to the sequence of the token before them: bool [batch, length]."""
    return pad(sequence_id[:, 1:] == sequence_id[:, :-1], (1, 0), value=False)


def starts(sequence_id: Tensor) -> Tensor:
    """The position in the row at which each token's sequence begins: int64 [batch, length]."""
    position = torch.arange(sequence_id.shape[1], device=sequence_id.device)
    return torch.where(continues(sequence_id), 0, position).cummax(dim=1).values


def places(sequence_id: Tensor) -> Tensor:
    """Each token's place in its own sequence, from 0: int64 [batch, length]."""
    return torch.arange(sequence_id.shape[1], device=sequence_id.device) - starts(sequence_id)
