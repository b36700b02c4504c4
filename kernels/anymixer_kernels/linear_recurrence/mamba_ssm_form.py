"""Mamba-2's recurrence by the kernels it was published with, mamba-ssm's."""

from dataclasses import dataclass

import torch
from torch import Tensor

from anymixer_kernels.blockwise import wide
from anymixer_kernels.mamba_ssm_scan import mamba_ssm_scan


@dataclass(frozen=True)
class StateSpace:
    """What v and log_decay are in Mamba-2: v = dt x and log_decay = A dt.

    x: [batch, length, nheads, headdim]. dt: [batch, length, nheads], positive. A: [nheads], negative.
    """

    x: Tensor
    dt: Tensor
    A: Tensor


def linear_recurrence_mamba_ssm(
    q: Tensor,
    k: Tensor,
    state_space: StateSpace,
    initial_state: Tensor | None,
    sequence_id: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y and the last state; arguments as in `linear_recurrence`."""
    x, dt, A = state_space.x, wide(state_space.dt), wide(state_space.A)
    if sequence_id is not None:
        x = torch.where((sequence_id >= 0)[..., None, None], x, 0.0)
    first = None if initial_state is None else wide(initial_state).transpose(-1, -2)
    y, last = mamba_ssm_scan(x, dt, A, k, q, sequence_id=sequence_id, initial_state=first)
    return y, last.transpose(-1, -2)
