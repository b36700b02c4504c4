"""The residual sum and PyTorch's own LayerNorm."""

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from anymixer_kernels.blockwise import wide


def add_norm_torch(
    residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """Arguments as in `anymixer_kernels.add_norm.add_norm`."""
    summed = wide(residual) + wide(branch)
    factor, offset = weight.to(summed.dtype), None if bias is None else bias.to(summed.dtype)
    return layer_norm(summed, weight.shape, factor, offset, eps).to(dtype)
