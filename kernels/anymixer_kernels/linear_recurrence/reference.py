"""The definition of the linear recurrence: the whole matrix, exact in float64."""

import torch
from torch import Tensor

from anymixer_kernels.blockwise import wide
from anymixer_kernels.sequences import same_sequence


def linear_recurrence_matrix(q: Tensor, k: Tensor, log_decay: Tensor, sequence_id: Tensor | None = None) -> Tensor:
    """M of the package's docstring, [batch, nheads, length, length]; arguments as in `linear_recurrence`."""
    length, nheads = log_decay.shape[1:3]
    q, k = (_heads(t, nheads) for t in (q, k))
    total = wide(log_decay).cumsum(1).transpose(1, 2)
    past = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    if total.dim() == 3:
        exponent = (total[..., :, None] - total[..., None, :]).masked_fill(~past, -torch.inf)
        matrix = (q @ k.transpose(-1, -2)) * exponent.exp()
    else:
        matrix = torch.zeros((), dtype=q.dtype, device=q.device)
        for q_n, k_n, total_n in zip(q.unbind(-1), k.unbind(-1), total.unbind(-1)):
            exponent = (total_n[..., :, None] - total_n[..., None, :]).masked_fill(~past, -torch.inf)
            matrix = matrix + q_n[..., :, None] * k_n[..., None, :] * exponent.exp()
    return matrix if sequence_id is None else torch.where(same_sequence(sequence_id), matrix, 0.0)


def linear_recurrence_both_ways_matrix(
    q: Tensor, k: Tensor, log_decay: Tensor, sequence_id: Tensor | None = None
) -> Tensor:
    """M of `linear_recurrence_both_ways`, [batch, nheads, length, length]: below and on the diagonal the recurrence's,
    above it that of the reversed row."""
    reversed_id = None if sequence_id is None else sequence_id.flip(1)
    back = linear_recurrence_matrix(q.flip(1), k.flip(1), log_decay.flip(1), reversed_id).flip(-2, -1)
    return linear_recurrence_matrix(q, k, log_decay, sequence_id) + back.triu(1)


def linear_recurrence_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    sequence_id: Tensor | None,
    chunk_size: int = 0,
) -> tuple[Tensor, Tensor]:
    """y and the last state; arguments as in `linear_recurrence`."""
    matrix = linear_recurrence_matrix(q, k, log_decay, sequence_id)
    values = wide(v).transpose(1, 2)
    y = matrix @ values
    total = _per_dimension(wide(log_decay).cumsum(1).transpose(1, 2))
    left = (total[..., -1:, :] - total).exp()
    if sequence_id is not None:
        last = (sequence_id == sequence_id[:, -1:]) & (sequence_id >= 0)
        left = left * last[:, None, :, None]
    state = (left * _heads(k, v.shape[2])).transpose(-1, -2) @ values
    if initial_state is not None:
        y = y + (_heads(q, v.shape[2]) * total.exp()) @ wide(initial_state)
        state = state + total[..., -1, :, None].exp() * wide(initial_state)
    return y.transpose(1, 2).to(v.dtype), state


def _heads(projections: Tensor, nheads: int) -> Tensor:
    """[batch, length, ngroups, n] -> [batch, nheads, length, n], float32 or wider."""
    return wide(projections).transpose(1, 2).repeat_interleave(nheads // projections.shape[2], dim=1)


def _per_dimension(total: Tensor) -> Tensor:
    """[batch, nheads, length] or [batch, nheads, length, n] -> with the last axis, of size 1 or n."""
    return total[..., None] if total.dim() == 3 else total
