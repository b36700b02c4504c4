"""Quasiseparable mixing: Hydra's bidirectional scan with shift and free diagonal, as one op.

Per head h the op is Y = M X with (Hydra, arXiv 2407.09941, section 3; the shift as in its published code)

    M[t,s] = (C_f[t-1] . B_f[s]) exp(A sum_{r=s+1}^{t-1} dt_f[r]) dt_f[s]      s < t
    M[t,s] = (C_b[t+1] . B_b[s]) exp(A sum_{r=t+1}^{s-1} dt_b[r]) dt_b[s]      s > t
    M[t,t] = diagonal[t]

and, with `shift=False` (the paper's ablation), every row reads at its own token and both directions reach it:

    M[t,s] = (C_f[t] . B_f[s]) exp(A sum_{r=s+1}^{t} dt_f[r]) dt_f[s]          s < t
    M[t,s] = (C_b[t] . B_b[s]) exp(A sum_{r=t}^{s-1} dt_b[r]) dt_b[s]          s > t
    M[t,t] = diagonal[t] + (C_f[t] . B_f[t]) dt_f[t] + (C_b[t] . B_b[t]) dt_b[t]

In all of them M[t,s] = 0 for tokens of different sequences. A row's tokens of one sequence must be contiguous.
"""

import dataclasses

import torch
from torch import Tensor

from anymixer_kernels.backend import current_backend, takes_mamba_ssm, takes_triton
from anymixer_kernels.quasiseparable.limits import no_triton_form_for
from anymixer_kernels.quasiseparable.mamba_ssm_form import quasiseparable_mamba_ssm
from anymixer_kernels.quasiseparable.reference import (
    QuasiseparableInputs,
    quasiseparable_matrix,
    quasiseparable_reference,
)
from anymixer_kernels.quasiseparable.torch_form import quasiseparable_torch

__all__ = [
    "QuasiseparableInputs",
    "quasiseparable",
    "quasiseparable_matrix",
    "quasiseparable_reference",
    "quasiseparable_torch",
]


def quasiseparable(inputs: QuasiseparableInputs, *, chunk_size: int = 256) -> Tensor:
    """Mix `inputs.x` along its length in both directions at once.

    chunk_size: most tokens a chunk of the linear-time form covers; the result does not depend on it.
    Returns [batch, length, nheads, headdim] in x's dtype; rows at padding are meaningless but finite.
    """
    if inputs.sequence_id is not None:
        real = (inputs.sequence_id >= 0)[..., None, None]
        inputs = dataclasses.replace(inputs, x=torch.where(real, inputs.x, 0.0))
    if current_backend() == "reference":
        return quasiseparable_reference(inputs)
    if takes_mamba_ssm(inputs.x, "quasiseparable mixing"):
        return quasiseparable_mamba_ssm(inputs, chunk_size)
    if takes_triton(inputs.x, "quasiseparable mixing", no_triton_form_for(inputs)):
        from anymixer_kernels.quasiseparable.triton_form import quasiseparable_triton

        return quasiseparable_triton(inputs)
    return quasiseparable_torch(inputs, chunk_size)
