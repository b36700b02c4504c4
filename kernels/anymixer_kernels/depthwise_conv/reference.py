"""Depthwise convolution spelled out tap by tap, exact in float64."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def depthwise_conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sequence_id: Tensor | None,
    packed: bool = True,
    causal: bool = False,
) -> Tensor:
    """y[t] = sum_o weight[o] x[t + o - reach] over the taps o that stay inside t's sequence; reach is width // 2, or
    width - 1 for the causal form."""
    length, width = x.shape[1], weight.shape[-1]
    ids = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device) if sequence_id is None else sequence_id
    reach = width - 1 if causal else width // 2
    padded_x = pad(x, (0, 0, reach, width - 1 - reach))
    padded_ids = pad(ids, (reach, width - 1 - reach), value=-1)
    mixed = torch.zeros_like(x) if bias is None else bias.to(x.dtype).expand_as(x)
    for tap in range(width):
        inside = (padded_ids[:, tap : tap + length] == ids) & (ids >= 0)
        shifted = torch.where(inside[..., None], padded_x[:, tap : tap + length], 0.0)
        mixed = mixed + shifted * weight[:, 0, tap].to(x.dtype)
    return mixed
