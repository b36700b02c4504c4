"""Mixing by systems that do not change with time: every channel is convolved with a kernel of its own.

    y_t = sum_{s <= t} below[t - s] v_s + sum_{s > t} above[s - t - 1] v_s        (within a sequence)

A kernel is given as its lags (`lti_mix`), or as a state space (`state_space_mix`), K_l = C A^l B, which also runs token
by token. Three forms, chosen by the row: Toeplitz products (short rows, and packed ones, whose sequences must not see
each other), Fourier transforms (long rows of one sequence), and a scan of states over chunks (long packed rows, and
wherever a state goes in or comes out).
"""

import torch
from torch import Tensor

from anymixer_kernels.backend import current_backend, runs_without_triton
from anymixer_kernels.lti.low_rank import LowRankSystem
from anymixer_kernels.lti.reference import lti_matrix, scan_reference
from anymixer_kernels.lti.scan import scan_torch
from anymixer_kernels.lti.systems import DenseSystem, DiagonalSystem, StateSpace, exact
from anymixer_kernels.lti.torch_form import lti_mix_torch
from anymixer_kernels.sequences import continues

__all__ = [
    "DenseSystem",
    "DiagonalSystem",
    "LowRankSystem",
    "StateSpace",
    "exact",
    "lti_matrix",
    "lti_mix",
    "state_space_mix",
    "state_space_scan",
]

# Longer packed rows are scanned: the chunks of their Toeplitz products are quadratic in the length.
SCAN_LENGTH = 256


def lti_mix(below: Tensor, v: Tensor, above: Tensor | None = None, sequence_id: Tensor | None = None) -> Tensor:
    """The product of the package's docstring.

    below, above: [channels, length], lag o at position o; without `above` no token sees a later one. v: [batch, length,
    channels]. sequence_id: [batch, length], -1 for padding, which leaves no trace; rows of one sequence whose padding
    is zero in v do without it, and are faster. Returns v's shape and dtype; rows at padding are finite.
    """
    if sequence_id is not None:
        v = torch.where((sequence_id >= 0)[..., None], v, 0.0)
    runs_without_triton(v, "LTI mixing")
    with torch.autocast(v.device.type, enabled=False):
        if current_backend() == "reference":
            matrix = lti_matrix(below, above, v.shape[0], sequence_id)
            return torch.einsum("bhts,bsh->bth", matrix.to(v.dtype), v)
        return lti_mix_torch(below, v, above, sequence_id)


def state_space_mix(
    system: StateSpace, v: Tensor, later: StateSpace | None = None, sequence_id: Tensor | None = None
) -> Tensor:
    """`lti_mix` with the kernels of state spaces; `later`: that of the later tokens."""
    length = v.shape[1]
    with torch.autocast(v.device.type, enabled=False):
        if sequence_id is None or length <= SCAN_LENGTH or current_backend() == "reference":
            above = None if later is None else later.kernel(length)
            return lti_mix(system.kernel(length), v, above, sequence_id)
        mixed, _ = state_space_scan(system, v, sequence_id=sequence_id)
        if later is None:
            return mixed
        ids = sequence_id.flip(1)
        back, _ = state_space_scan(later, v.flip(1), sequence_id=ids)
        # A token reads what its later neighbour has gathered.
        back = torch.where(continues(ids)[..., None], back.roll(1, dims=1), 0.0)
        return mixed + back.flip(1)


def state_space_scan(
    system: StateSpace, v: Tensor, *, initial_state: Tensor | None = None, sequence_id: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y, and the state after each row's last token.

    v: [batch, length, channels]; initial_state, and the state returned: [batch, channels, system.width], float32 or
    wider. sequence_id as in `lti_mix`; a state belongs to one sequence, so that there is no initial state besides it,
    and a row that ends in padding leaves none.
    """
    if initial_state is not None and sequence_id is not None:
        raise ValueError("initial_state: a state belongs to one sequence; give it or sequence_id, not both")
    if sequence_id is not None:
        v = torch.where((sequence_id >= 0)[..., None], v, 0.0)
    runs_without_triton(v, "LTI mixing")
    form = scan_reference if current_backend() == "reference" else scan_torch
    with torch.autocast(v.device.type, enabled=False):
        return form(system, v, initial_state, sequence_id)
