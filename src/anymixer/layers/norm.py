"""Normalisation layers that torch.nn does not have."""

import torch
from anymixer_kernels.gated_norm import gated_norm
from torch import Tensor, nn


class GatedRMSNorm(nn.Module):
    """RMSNorm(x) * weight * silu(gate), the norm before the gate (Mamba-2, arXiv 2405.21060)."""

    def __init__(self, width: int, eps: float = 1e-5, device=None, dtype=None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x, gate: [..., width]. Computed in float32 or wider, returned in x's dtype."""
        return gated_norm(x, gate, self.weight, self.eps)
