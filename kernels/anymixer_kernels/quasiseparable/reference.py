"""The definition of quasiseparable mixing: every matrix entry spelled out, exact in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

from anymixer_kernels.sequences import continues, same_sequence, starts


@dataclass(frozen=True)
class QuasiseparableInputs:
    """What the op reads; pairs are (forward, backward).

    x: [batch, length, nheads, headdim]. dt: each [batch, length, nheads], positive. A: [nheads], negative.
    B, C: each [batch, length, ngroups, d_state]; head h reads group h // (nheads // ngroups).
    diagonal: [batch, length, nheads]; None is zero. sequence_id: [batch, length] integers, -1 for padding (ignored as a
    source); None means that every row is one sequence without padding. initial_state: [nheads, headdim,
    d_state], the state before the first token of every sequence, in both directions; None is zero. shift: row
    t reads the state of its neighbour, so that it is fed by its own token through the diagonal alone.
    """

    x: Tensor
    dt: tuple[Tensor, Tensor]
    A: Tensor
    B: tuple[Tensor, Tensor]
    C: tuple[Tensor, Tensor]
    diagonal: Tensor | None = None
    sequence_id: Tensor | None = None
    initial_state: Tensor | None = None
    shift: bool = True


def expand_groups(projections: Tensor, nheads: int) -> Tensor:
    """Give every head its group's projection: [batch, length, ngroups, n] -> [batch, nheads, length, n]."""
    return projections.transpose(1, 2).repeat_interleave(nheads // projections.shape[2], dim=1)


def quasiseparable_matrix(inputs: QuasiseparableInputs) -> Tensor:
    """The mixing matrix M of the package's docstring: [batch, nheads, length, length].

    Columns of padding are zero. What an initial state adds is no part of it.
    """
    nheads = inputs.x.shape[2]
    dt, A, B, C = inputs.dt, inputs.A, inputs.B, inputs.C
    forward = _triangle(dt[0], A, expand_groups(B[0], nheads), expand_groups(C[0], nheads), inputs.shift)
    flipped_B, flipped_C = (expand_groups(p[1].flip(1), nheads) for p in (B, C))
    matrix = forward + _triangle(dt[1].flip(1), A, flipped_B, flipped_C, inputs.shift).flip(-2, -1)
    if inputs.diagonal is not None:
        matrix = matrix + torch.diag_embed(inputs.diagonal.transpose(1, 2))
    if inputs.sequence_id is None:
        return matrix
    return torch.where(same_sequence(inputs.sequence_id), matrix, 0.0)


def _triangle(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, shift: bool) -> Tensor:
    """Lower triangle (C[t] . B[s]) exp(A sum_{r=s+1}^{t} dt[r]) dt[s], with its diagonal; row t-1 of it at t
    with `shift`.

    dt: [batch, length, nheads]; B, C: [batch, nheads, length, n]. Returns [batch, nheads, length, length].
    """
    length = dt.shape[1]
    dt = dt.transpose(1, 2)
    total = torch.cumsum(A[:, None] * dt, dim=-1)
    exponent = total[..., :, None] - total[..., None, :]
    keep = torch.ones(length, length, dtype=torch.bool, device=dt.device).tril()
    decay = torch.exp(exponent.masked_fill(~keep, -torch.inf))
    inclusive = (C @ B.transpose(-1, -2)) * decay * dt[..., None, :]
    return torch.nn.functional.pad(inclusive[..., :-1, :], (0, 0, 1, 0)) if shift else inclusive


def quasiseparable_reference(inputs: QuasiseparableInputs) -> Tensor:
    """Y = M X with the whole matrix: [batch, length, nheads, headdim]."""
    mixed = torch.einsum("bhts,bshp->bthp", quasiseparable_matrix(inputs).to(inputs.x.dtype), inputs.x)
    if inputs.initial_state is None:
        return mixed
    return mixed + initial_state_terms(inputs).to(inputs.x.dtype)


def initial_state_terms(inputs: QuasiseparableInputs) -> Tensor:
    """What the initial state adds, both directions: [batch, length, nheads, headdim]."""
    state, ids, shift = inputs.initial_state, inputs.sequence_id, inputs.shift
    assert state is not None
    reversed_ids = None if ids is None else ids.flip(1)
    forward = _initial_state_term(state, inputs.dt[0], inputs.A, inputs.C[0], ids, shift)
    backward = _initial_state_term(state, inputs.dt[1].flip(1), inputs.A, inputs.C[1].flip(1), reversed_ids, shift)
    return forward + backward.flip(1)


def _initial_state_term(
    state: Tensor, dt: Tensor, A: Tensor, C: Tensor, sequence_id: Tensor | None, shift: bool
) -> Tensor:
    """One direction's: row t is C[t] . state, decayed by all tokens of its sequence up to t; t-1 with `shift`."""
    batch, length, nheads = dt.shape
    ids = torch.zeros(batch, length, dtype=torch.long, device=dt.device) if sequence_id is None else sequence_id
    start = starts(ids)
    total = torch.cumsum(A * dt, dim=1)
    before = total - A * dt
    decay = torch.exp(total - before.gather(1, start[..., None].expand(-1, -1, nheads)))
    readout = torch.einsum("bhln,hpn->blhp", expand_groups(C, nheads), state.to(C.dtype))
    inclusive = decay[..., None] * readout
    if not shift:
        return inclusive
    shifted = torch.nn.functional.pad(inclusive[:, :-1], (0, 0, 0, 0, 1, 0))
    return torch.where(continues(ids)[..., None, None], shifted, 0.0)
