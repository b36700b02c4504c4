"""The definition of quasiseparable mixing: every matrix entry spelled out, exact in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuasiseparableInputs:
    """What the op reads; pairs are (forward, backward).

    x: [batch, length, nheads, headdim]. dt: each [batch, length, nheads], positive. A: [nheads], negative.
    B, C: each [batch, length, ngroups, d_state]; head h reads group h // (nheads // ngroups).
    diagonal: [batch, length, nheads]. sequence_id: [batch, length] integers, -1 for padding (ignored as a
    source); None means that every row is one sequence without padding. initial_state: [nheads, headdim,
    d_state], the state before the first token of every sequence, in both directions; None is zero.
    """

    x: Tensor
    dt: tuple[Tensor, Tensor]
    A: Tensor
    B: tuple[Tensor, Tensor]
    C: tuple[Tensor, Tensor]
    diagonal: Tensor
    sequence_id: Tensor | None = None
    initial_state: Tensor | None = None


def expand_groups(projections: Tensor, nheads: int) -> Tensor:
    """Give every head its group's projection: [batch, length, ngroups, n] -> [batch, nheads, length, n]."""
    return projections.transpose(1, 2).repeat_interleave(nheads // projections.shape[2], dim=1)


def same_sequence(sequence_id: Tensor) -> Tensor:
    """Which tokens share a sequence: [batch, length] -> bool [batch, 1, length, length]."""
    return (sequence_id[:, :, None] == sequence_id[:, None, :])[:, None]


def quasiseparable_matrix(inputs: QuasiseparableInputs) -> Tensor:
    """The mixing matrix M of the package's docstring: [batch, nheads, length, length].

    Columns of padding are zero. What an initial state adds is no part of it.
    """
    nheads = inputs.diagonal.shape[2]
    dt, A, B, C = inputs.dt, inputs.A, inputs.B, inputs.C
    forward = _shifted_triangle(dt[0], A, expand_groups(B[0], nheads), expand_groups(C[0], nheads))
    flipped_B, flipped_C = (expand_groups(p[1].flip(1), nheads) for p in (B, C))
    backward = _shifted_triangle(dt[1].flip(1), A, flipped_B, flipped_C).flip(-2, -1)
    matrix = forward + backward + torch.diag_embed(inputs.diagonal.transpose(1, 2))
    if inputs.sequence_id is None:
        return matrix
    real = (inputs.sequence_id >= 0)[:, None, None, :]
    return torch.where(same_sequence(inputs.sequence_id) & real, matrix, 0.0)


def _shifted_triangle(dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Strictly lower triangle (C[t-1] . B[s]) exp(A sum_{r=s+1}^{t-1} dt[r]) dt[s].

    dt: [batch, length, nheads]; B, C: [batch, nheads, length, n]. Returns [batch, nheads, length, length].
    """
    length = dt.shape[1]
    dt = dt.transpose(1, 2)
    total = torch.cumsum(A[:, None] * dt, dim=-1)
    exponent = total[..., :, None] - total[..., None, :]
    keep = torch.ones(length, length, dtype=torch.bool, device=dt.device).tril()
    decay = torch.exp(exponent.masked_fill(~keep, -torch.inf))
    inclusive = (C @ B.transpose(-1, -2)) * decay * dt[..., None, :]
    return torch.nn.functional.pad(inclusive[..., :-1, :], (0, 0, 1, 0))


def quasiseparable_reference(inputs: QuasiseparableInputs) -> Tensor:
    """Y = M X with the whole matrix: [batch, length, nheads, headdim]."""
    mixed = torch.einsum("bhts,bshp->bthp", quasiseparable_matrix(inputs).to(inputs.x.dtype), inputs.x)
    if inputs.initial_state is None:
        return mixed
    return mixed + initial_state_terms(inputs).to(inputs.x.dtype)


def initial_state_terms(inputs: QuasiseparableInputs) -> Tensor:
    """What the initial state adds, both directions: [batch, length, nheads, headdim]."""
    state, ids = inputs.initial_state, inputs.sequence_id
    assert state is not None
    reversed_ids = None if ids is None else ids.flip(1)
    forward = _initial_state_term(state, inputs.dt[0], inputs.A, inputs.C[0], ids)
    backward = _initial_state_term(state, inputs.dt[1].flip(1), inputs.A, inputs.C[1].flip(1), reversed_ids)
    return forward + backward.flip(1)


def _initial_state_term(state: Tensor, dt: Tensor, A: Tensor, C: Tensor, sequence_id: Tensor | None) -> Tensor:
    """One direction's: row t is C[t-1] . state, decayed by all tokens of its sequence up to t-1."""
    batch, length, nheads = dt.shape
    position = torch.arange(length, device=dt.device).expand(batch, length)
    ids = torch.zeros_like(position) if sequence_id is None else sequence_id
    same_as_previous = torch.nn.functional.pad(ids[:, 1:] == ids[:, :-1], (1, 0), value=False)
    start = torch.where(same_as_previous, 0, position).cummax(dim=1).values
    total = torch.cumsum(A * dt, dim=1)
    before = total - A * dt
    decay = torch.exp(total - before.gather(1, start[..., None].expand(-1, -1, nheads)))
    readout = torch.einsum("bhln,hpn->blhp", expand_groups(C, nheads), state.to(C.dtype))
    inclusive = decay[..., None] * readout
    shifted = torch.nn.functional.pad(inclusive[:, :-1], (0, 0, 0, 0, 1, 0))
    return torch.where(same_as_previous[..., None, None], shifted, 0.0)
