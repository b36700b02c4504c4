"""The definition of mixing by a time-invariant system: its whole matrix, or one token after the other; exact in
float64."""

import torch
from torch import Tensor

from anymixer_kernels.lti.systems import StateSpace
from anymixer_kernels.sequences import continues, same_sequence


def lti_matrix(below: Tensor, above: Tensor | None, batch: int, sequence_id: Tensor | None) -> Tensor:
    """The matrix, [batch, channels, length, length]; arguments as in `lti_mix`."""
    index = torch.arange(below.shape[-1], device=below.device)
    lag = index[:, None] - index
    matrix = torch.where(lag >= 0, below[:, lag.clamp(min=0)], 0.0)
    if above is not None:
        matrix = torch.where(lag < 0, above[:, (-lag - 1).clamp(min=0)], matrix)
    matrix = matrix.expand(batch, -1, -1, -1)
    return matrix if sequence_id is None else torch.where(same_sequence(sequence_id), matrix, 0.0)


def scan_reference(
    system: StateSpace, v: Tensor, initial_state: Tensor | None, sequence_id: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y and the last state; arguments as in `state_space_scan`."""
    state = system.init_state(v.shape[0]) if initial_state is None else initial_state
    goes_on = None if sequence_id is None else continues(sequence_id)
    outputs = []
    for place, v_t in enumerate(v.unbind(1)):
        if goes_on is not None:
            state = torch.where(goes_on[:, place, None, None], state, 0.0)
        y, state = system.step(v_t, state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state
