"""Causal mixing by a recurrence with a matrix for a state and a diagonal decay:

    S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T        y_t = q_t^T S_t

Mamba-2's SSD (one decay a head, arXiv 2405.21060), gated linear attention and HGRN2 (one decay a dimension of the
keys, arXiv 2312.06635, 2404.07904), linear attention (no decay). As a matrix, M[t,s] = sum_n q[t,n] k[s,n]
exp(sum_{r=s+1}^{t} log_decay[r,n]) for s <= t, within a sequence.
"""

from functools import partial

from torch import Tensor

from anymixer_kernels.backend import current_backend, runs_without_triton, takes_mamba_ssm
from anymixer_kernels.linear_recurrence.both_ways import mix_both_ways
from anymixer_kernels.linear_recurrence.mamba_ssm_form import StateSpace, linear_recurrence_mamba_ssm
from anymixer_kernels.linear_recurrence.reference import (
    linear_recurrence_both_ways_matrix,
    linear_recurrence_matrix,
    linear_recurrence_reference,
)
from anymixer_kernels.linear_recurrence.torch_form import linear_recurrence_torch

__all__ = [
    "StateSpace",
    "linear_recurrence",
    "linear_recurrence_both_ways",
    "linear_recurrence_both_ways_matrix",
    "linear_recurrence_matrix",
    "linear_recurrence_reference",
    "linear_recurrence_step",
]


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    sequence_id: Tensor | None = None,
    chunk_size: int = 64,
    state_space: StateSpace | None = None,
) -> tuple[Tensor, Tensor]:
    """Mix `v` along its length.

    q, k: [batch, length, ngroups, d_state]; head h reads group h // (nheads // ngroups). v: [batch, length, nheads,
    headdim]. log_decay: [batch, length, nheads], or [batch, length, nheads, d_state] with as many groups as heads;
    at most 0, or little above. initial_state: [batch, nheads, d_state, headdim]. sequence_id: [batch, length], -1 for
    padding; the state starts from 0 in every sequence, so that there is no initial state besides it. chunk_size: the
    result does not depend on it. state_space: what v and log_decay were made of, where they were; the mamba_ssm backend
    reads it in their place.
    Returns y (v's shape and dtype) and the state after the last token, [batch, nheads, d_state, headdim] in float32 or
    wider. Padding leaves no trace in either; rows of y at padding are meaningless but finite.
    """
    if initial_state is not None and sequence_id is not None:
        raise ValueError("initial_state: a state belongs to one sequence; give it or sequence_id, not both")
    if takes_mamba_ssm(v, "linear recurrence", None if state_space else "decays other than step sizes times A"):
        assert state_space is not None
        return linear_recurrence_mamba_ssm(q, k, state_space, initial_state, sequence_id)
    runs_without_triton(v, "linear recurrence")
    form = linear_recurrence_reference if current_backend() == "reference" else linear_recurrence_torch
    return form(q, k, v, log_decay, initial_state, sequence_id, chunk_size)


def linear_recurrence_both_ways(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    sequence_id: Tensor | None = None,
    chunk_size: int = 64,
) -> Tensor:
    """Mix `v` along its length from both ends, with one set of q, k, v and decays; arguments as in `linear_recurrence`.

    M[t,s] is the recurrence's for s <= t and that of the reversed row for s > t, so that a token's own part, which both
    directions have, counts once. Returns y, of v's shape and dtype.
    """
    return mix_both_ways(partial(_recur, chunk_size=chunk_size), q, k, v, log_decay, sequence_id)


def _recur(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, sequence_id: Tensor | None, *, chunk_size: int
) -> Tensor:
    return linear_recurrence(q, k, v, log_decay, sequence_id=sequence_id, chunk_size=chunk_size)[0]


def linear_recurrence_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token: q, k [batch, ngroups, d_state], v [batch, nheads, headdim], log_decay [batch, nheads] or [batch,
    nheads, d_state], state [batch, nheads, d_state, headdim] -> y [batch, nheads, headdim] in v's dtype, and the new
    state."""
    nheads = v.shape[1]
    q, k = (t.repeat_interleave(nheads // t.shape[1], dim=1).to(state.dtype) for t in (q, k))
    decay = log_decay.to(state.dtype).exp()
    decay = decay[..., None] if decay.dim() == 3 else decay[..., None, None]
    state = decay * state + k[..., None] * v.to(state.dtype)[..., None, :]
    return (q[..., None, :] @ state)[..., 0, :].to(v.dtype), state
