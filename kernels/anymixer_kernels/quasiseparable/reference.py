"""The definition of quasiseparable mixing: every matrix entry spelled out, exact in float64."""

import torch
from torch import Tensor


def expand_groups(projections: Tensor, nheads: int) -> Tensor:
    """Give every head its group's projection: [batch, length, ngroups, n] -> [batch, nheads, length, n]."""
    return projections.transpose(1, 2).repeat_interleave(nheads // projections.shape[2], dim=1)


def same_sequence(sequence_id: Tensor) -> Tensor:
    """Which tokens share a sequence: [batch, length] -> bool [batch, 1, length, length]."""
    return (sequence_id[:, :, None] == sequence_id[:, None, :])[:, None]


def quasiseparable_matrix(
    dt: tuple[Tensor, Tensor],
    A: Tensor,
    B: tuple[Tensor, Tensor],
    C: tuple[Tensor, Tensor],
    diagonal: Tensor,
    *,
    sequence_id: Tensor | None = None,
) -> Tensor:
    """The mixing matrix M of the module's docstring: [batch, nheads, length, length].

    Arguments as in `anymixer_kernels.quasiseparable.quasiseparable`; padding columns are zero.
    """
    length, nheads = diagonal.shape[1:]
    forward = _shifted_triangle(dt[0], A, expand_groups(B[0], nheads), expand_groups(C[0], nheads))
    flipped_B, flipped_C = (expand_groups(p[1].flip(1), nheads) for p in (B, C))
    backward = _shifted_triangle(dt[1].flip(1), A, flipped_B, flipped_C).flip(-2, -1)
    matrix = forward + backward + torch.diag_embed(diagonal.transpose(1, 2))
    if sequence_id is None:
        return matrix
    real = (sequence_id >= 0)[:, None, None, :]
    return torch.where(same_sequence(sequence_id) & real, matrix, 0.0)


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


def initial_state_output(initial_state: Tensor, dt: Tensor, A: Tensor, C: Tensor, sequence_id: Tensor | None) -> Tensor:
    """What a state before each sequence's first token adds, one direction, after the shift.

    initial_state: [nheads, headdim, n]; dt: [batch, length, nheads]; C: [batch, length, ngroups, n].
    Returns [batch, length, nheads, headdim]: row t is C[t-1] . state decayed by all tokens up to t-1.
    """
    batch, length, nheads = dt.shape
    position = torch.arange(length, device=dt.device).expand(batch, length)
    ids = torch.zeros_like(position) if sequence_id is None else sequence_id
    same_as_previous = torch.nn.functional.pad(ids[:, 1:] == ids[:, :-1], (1, 0), value=False)
    start = torch.where(same_as_previous, 0, position).cummax(dim=1).values
    total = torch.cumsum(A * dt, dim=1)
    before = total - A * dt
    decay = torch.exp(total - before.gather(1, start[..., None].expand(-1, -1, nheads)))
    readout = torch.einsum("bhln,hpn->blhp", expand_groups(C, nheads), initial_state.to(C.dtype))
    inclusive = decay[..., None] * readout
    shifted = torch.nn.functional.pad(inclusive[:, :-1], (0, 0, 0, 0, 1, 0))
    return torch.where(same_as_previous[..., None, None], shifted, 0.0)


def quasiseparable_reference(
    x: Tensor,
    dt: tuple[Tensor, Tensor],
    A: Tensor,
    B: tuple[Tensor, Tensor],
    C: tuple[Tensor, Tensor],
    diagonal: Tensor,
    *,
    sequence_id: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 256,
) -> Tensor:
    """Y = M X with the whole matrix; arguments as in the public op (`chunk_size` plays no part here)."""
    matrix = quasiseparable_matrix(dt, A, B, C, diagonal, sequence_id=sequence_id)
    mixed = torch.einsum("bhts,bshp->bthp", matrix.to(x.dtype), x)
    if initial_state is None:
        return mixed
    return mixed + initial_state_terms(initial_state, dt, A, C, sequence_id).to(x.dtype)


def initial_state_terms(
    initial_state: Tensor,
    dt: tuple[Tensor, Tensor],
    A: Tensor,
    C: tuple[Tensor, Tensor],
    sequence_id: Tensor | None,
) -> Tensor:
    """`initial_state_output` of both directions: [batch, length, nheads, headdim]."""
    reversed_ids = None if sequence_id is None else sequence_id.flip(1)
    forward = initial_state_output(initial_state, dt[0], A, C[0], sequence_id)
    backward = initial_state_output(initial_state, dt[1].flip(1), A, C[1].flip(1), reversed_ids)
    return forward + backward.flip(1)
