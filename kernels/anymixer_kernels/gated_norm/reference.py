"""The definition of the gated norm, exact in float64."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from anymixer_kernels.blockwise import wide


def gated_norm_reference(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Arguments as in `gated_norm`."""
    scaled = wide(x) * torch.rsqrt(wide(x).square().mean(dim=-1, keepdim=True) + eps)
    return (scaled * wide(weight) * silu(wide(gate))).to(x.dtype)
