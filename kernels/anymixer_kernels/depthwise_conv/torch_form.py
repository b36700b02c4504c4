"""Depthwise convolution through `conv1d`; rows that hold several sequences go tap by tap."""

import torch
from torch import Tensor
from torch.nn.functional import conv1d

from anymixer_kernels.depthwise_conv.reference import depthwise_conv_reference


def depthwise_conv_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sequence_id: Tensor | None,
    packed: bool = True,
    causal: bool = False,
) -> Tensor:
    """Arguments as in `anymixer_kernels.depthwise_conv.depthwise_conv`."""
    if sequence_id is not None:
        if packed:
            return depthwise_conv_reference(x, weight, bias, sequence_id, causal=causal)
        x = torch.where((sequence_id >= 0)[..., None], x, 0.0)
    channels, length, width = x.shape[-1], x.shape[1], weight.shape[-1]
    padding = width - 1 if causal else width // 2
    mixed = conv1d(x.transpose(1, 2), weight, bias, padding=padding, groups=channels)
    return mixed[..., :length].transpose(1, 2)
