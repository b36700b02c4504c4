"""Normalisation layers that torch.nn does not have."""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu


class GatedRMSNorm(nn.Module):
    """RMSNorm(x) * weight * silu(gate), the norm before the gate (Mamba-2, arXiv 2405.21060)."""

    def __init__(self, width: int, eps: float = 1e-5, device=None, dtype=None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x, gate: [..., width]. Computed in float32 or wider, returned in x's dtype."""
        wide = torch.promote_types(x.dtype, torch.float32)
        scaled = x.to(wide)
        scaled = scaled * torch.rsqrt(scaled.square().mean(dim=-1, keepdim=True) + self.eps)
        return (scaled * self.weight.to(wide) * silu(gate.to(wide))).to(x.dtype)
