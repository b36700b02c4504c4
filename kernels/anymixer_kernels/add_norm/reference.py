"""The definition of the residual sum with its LayerNorm, exact in float64."""

import torch
from torch import Tensor

from anymixer_kernels.blockwise import wide


def add_norm_reference(
    residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """Arguments as in `add_norm`."""
    summed = wide(residual) + wide(branch)
    centred = summed - summed.mean(dim=-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps) * wide(weight)
    return (y if bias is None else y + wide(bias)).to(dtype)
