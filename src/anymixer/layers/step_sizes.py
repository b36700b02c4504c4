"""Initial step sizes of state-space mixers."""

import math

import torch
from torch import Tensor


@torch.no_grad()
def draw_step_bias(dt_bias: Tensor, dt_min: float, dt_max: float, floor: float) -> None:
    """Fill `dt_bias` such that softplus(dt_bias) is log-uniform in [dt_min, dt_max] and at least `floor` (Mamba, arXiv
    2312.00752, section 3.6)."""
    dt = torch.empty_like(dt_bias).uniform_(math.log(dt_min), math.log(dt_max)).exp().clamp(min=floor)
    dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
