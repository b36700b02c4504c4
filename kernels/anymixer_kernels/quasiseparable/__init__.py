"""Quasiseparable mixing: Hydra's bidirectional scan with shift and free diagonal, as one op.

Per head h the op is Y = M X with (Hydra, arXiv 2407.09941, section 3; the shift as in its published code)

    M[t,s] = (C_f[t-1] . B_f[s]) exp(A sum_{r=s+1}^{t-1} dt_f[r]) dt_f[s]      s < t
    M[t,s] = (C_b[t+1] . B_b[s]) exp(A sum_{r=t+1}^{s-1} dt_b[r]) dt_b[s]      s > t
    M[t,t] = diagonal[t]

and M[t,s] = 0 for tokens of different sequences. A row's tokens of one sequence must be contiguous.
"""

import torch
from torch import Tensor

from anymixer_kernels.backend import current_backend
from anymixer_kernels.quasiseparable.reference import quasiseparable_matrix, quasiseparable_reference
from anymixer_kernels.quasiseparable.torch_form import quasiseparable_torch

__all__ = ["quasiseparable", "quasiseparable_matrix", "quasiseparable_reference", "quasiseparable_torch"]


def quasiseparable(
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
    """Mix `x` along its length in both directions at once.

    x: [batch, length, nheads, headdim]. dt: (forward, backward), each [batch, length, nheads], positive.
    A: [nheads], negative. B, C: (forward, backward), each [batch, length, ngroups, d_state]; head h reads
    group h // (nheads // ngroups). diagonal: [batch, length, nheads].
    sequence_id: [batch, length] integers, -1 for padding (ignored as a source); None means that every row
    is one sequence without padding. initial_state: [nheads, headdim, d_state], the state before the first
    token of every sequence, in both directions. chunk_size: most tokens a chunk of the linear-time form covers.

    Returns [batch, length, nheads, headdim] in x's dtype; rows at padding are meaningless but finite.
    """
    form = quasiseparable_reference if current_backend() == "reference" else quasiseparable_torch
    if sequence_id is not None:
        x = torch.where((sequence_id >= 0)[..., None, None], x, 0.0)
    return form(x, dt, A, B, C, diagonal, sequence_id=sequence_id, initial_state=initial_state, chunk_size=chunk_size)
