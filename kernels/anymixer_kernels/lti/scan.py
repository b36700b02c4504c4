"""A state space over chunks: inside each a convolution, between them a scan of states. Linear in the length."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from anymixer_kernels.blockwise import wide
from anymixer_kernels.lti.systems import StateSpace
from anymixer_kernels.lti.torch_form import lti_mix_torch

CHUNK = 64


def scan_torch(
    system: StateSpace, v: Tensor, initial_state: Tensor | None, sequence_id: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y and the last state; arguments as in `state_space_scan`."""
    length = v.shape[1]
    size = min(length, CHUNK)
    # On the left, so that the last state is that of the last token. An initial state must not be padded away from
    # its row: then the tokens that do not fill a chunk are the first chunk, by themselves.
    extra = -length % size
    if initial_state is not None and extra:
        head, state = scan_torch(system, v[:, : size - extra], initial_state, None)
        tail, state = scan_torch(system, v[:, size - extra :], state, None)
        return torch.cat([head, tail], dim=1), state
    v = pad(v, (0, 0, extra, 0)).unflatten(1, (-1, size))
    ids = None if sequence_id is None else pad(sequence_id, (extra, 0), value=-1).unflatten(1, (-1, size))

    flat_ids = None if ids is None else ids.flatten(0, 1)
    inside = lti_mix_torch(system.kernel(size), v.flatten(0, 1), None, flat_ids).unflatten(0, v.shape[:2])
    starts, state = _across(system, v, ids, initial_state)
    across = torch.einsum("hts,bchs->bcth", system.reads(size + 1)[:, 1:], starts)
    if ids is not None:
        arriving = pad(ids[:, :-1, -1], (1, 0), value=-1)
        across = torch.where((ids == arriving[..., None])[..., None], across, 0.0)
    return (inside + across.to(v.dtype)).flatten(1, 2)[:, extra:], state


def _across(system: StateSpace, v: Tensor, ids: Tensor | None, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The states before each chunk, [batch, chunks, channels, width], and after the last.

    v: [batch, chunks, size, channels]. The state that leaves a chunk is that of its last token's sequence.
    """
    size = v.shape[2]
    goes_on = None
    if ids is not None:
        leaving = ids[..., -1]
        v = torch.where((ids == leaving[..., None])[..., None], v, 0.0)
        goes_on = (leaving == pad(leaving[:, :-1], (1, 0), value=-1))[..., None, None]
    gained = torch.einsum("hts,bcth->bchs", system.gathers(size).flip(1), wide(v))
    advance = system.advance(size)
    state = system.init_state(v.shape[0]) if initial_state is None else initial_state
    starts = []
    for chunk, gain in enumerate(gained.unbind(1)):
        starts.append(state)
        state = advance(state)
        state = gain + (state if goes_on is None else torch.where(goes_on[:, chunk], state, 0.0))
    return torch.stack(starts, dim=1), state
