"""Depthwise convolution through `conv1d`; rows that hold several sequences go tap by tap."""

import torch
from torch import Tensor
from torch.nn.functional import conv1d

from anymixer_kernels.depthwise_conv.reference import depthwise_conv_reference


def depthwise_conv_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, sequence_id: Tensor | None, packed: bool = True
) -> Tensor:
    """Arguments as in `anymixer_kernels.depthwise_conv.depthwise_conv`."""
    if sequence_id is not None:
        if packed:
            return depthwise_conv_reference(x, weight, bias, sequence_id)
        x = torch.where((sequence_id >= 0)[..., None], x, 0.0)
    channels, width = x.shape[-1], weight.shape[-1]
    return conv1d(x.transpose(1, 2), weight, bias, padding=width // 2, groups=channels).transpose(1, 2)
