"""The definition of the element-wise scan: one token after the other."""

import torch
from torch import Tensor


def elementwise_scan_reference(a: Tensor, b: Tensor, initial_state: Tensor | None) -> Tensor:
    """a, b: [batch, length, ...]; initial_state: [batch, ...]. Returns all states, [batch, length, ...]."""
    state = torch.zeros_like(b[:, 0]) if initial_state is None else initial_state
    states = []
    for a_t, b_t in zip(a.unbind(1), b.unbind(1)):
        state = a_t * state + b_t
        states.append(state)
    return torch.stack(states, dim=1)
