"""Quasiseparable mixing as Hydra was published: two of Mamba-2's scans, the second over the reversed row, in one batch
of mamba-ssm's kernels; the shift, the diagonal and initial states are added around them."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from anymixer_kernels.blockwise import wide
from anymixer_kernels.mamba_ssm_scan import mamba_ssm_scan
from anymixer_kernels.quasiseparable.reference import QuasiseparableInputs, initial_state_terms
from anymixer_kernels.sequences import continues


def quasiseparable_mamba_ssm(inputs: QuasiseparableInputs, chunk_size: int = 256) -> Tensor:
    """Y = M X as [batch, length, nheads, headdim]; x is 0 at padding."""
    x, ids = inputs.x, inputs.sequence_id
    both_ids = None if ids is None else _both(ids, ids)
    dt, B, C = (_both(*pair) for pair in (inputs.dt, inputs.B, inputs.C))
    options = {"sequence_id": both_ids, "chunk_size": chunk_size}
    y, _ = mamba_ssm_scan(_both(x, x), wide(dt), wide(inputs.A), B, C, **options)
    if inputs.shift:
        y = pad(y[:, :-1], (0, 0, 0, 0, 1, 0))
        if both_ids is not None:
            y = torch.where(continues(both_ids)[..., None, None], y, 0.0)
    batch = x.shape[0]
    mixed = y[:batch] + y[batch:].flip(1)
    if inputs.diagonal is not None:
        mixed = mixed + inputs.diagonal[..., None].to(x.dtype) * x
    if inputs.initial_state is not None:
        mixed = mixed + initial_state_terms(inputs)
    return mixed.to(x.dtype)


def _both(forward: Tensor, backward: Tensor) -> Tensor:
    """Rows read from the left, then rows read from the right."""
    return torch.cat([forward, backward.flip(1)])
