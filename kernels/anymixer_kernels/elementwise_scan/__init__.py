"""An element-wise linear recurrence, h_t = a_t h_{t-1} + b_t: of gated RNNs (HGRN, qLSTM) and selective scans (S6)."""

import torch
from torch import Tensor

from anymixer_kernels.backend import current_backend, runs_without_triton
from anymixer_kernels.elementwise_scan.reference import elementwise_scan_reference
from anymixer_kernels.elementwise_scan.torch_form import elementwise_scan_torch
from anymixer_kernels.sequences import continues

__all__ = ["elementwise_scan"]


def elementwise_scan(
    a: Tensor, b: Tensor, *, initial_state: Tensor | None = None, sequence_id: Tensor | None = None
) -> Tensor:
    """All h: [batch, length, ...], the shape of a and b.

    initial_state: [batch, ...], h before the first token; None is 0. sequence_id: [batch, length], -1 for padding;
    every sequence starts from 0 (initial_state is that of rows that begin within a sequence, and not for use with it),
    and padding passes on what was before it.
    """
    if sequence_id is not None:
        if initial_state is not None:
            raise ValueError("initial_state: a state belongs to one sequence; give it or sequence_id, not both")
        trailing = (...,) + (None,) * (a.dim() - 2)
        real, inside = (sequence_id >= 0)[trailing], continues(sequence_id)[trailing]
        a, b = torch.where(real, torch.where(inside, a, 0.0), 1.0), torch.where(real, b, 0.0)
    runs_without_triton(a, "element-wise scan")
    form = elementwise_scan_reference if current_backend() == "reference" else elementwise_scan_torch
    return form(a, b, initial_state)
