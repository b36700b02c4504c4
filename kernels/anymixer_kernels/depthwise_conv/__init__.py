"""Depthwise convolution over the tokens of each sequence, odd width, "same" padding, optional SiLU.

The window of a token never reaches padding or another sequence: outside its own sequence the input is zero,
exactly as if the sequence stood alone.
"""

from torch import Tensor
from torch.nn.functional import silu

from anymixer_kernels.backend import current_backend
from anymixer_kernels.depthwise_conv.reference import depthwise_conv_reference
from anymixer_kernels.depthwise_conv.torch_form import depthwise_conv_torch

__all__ = ["depthwise_conv", "depthwise_conv_reference", "depthwise_conv_torch"]


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    sequence_id: Tensor | None = None,
    packed: bool = True,
    activate: bool = True,
) -> Tensor:
    """silu(conv(x)), channel by channel; conv(x) alone without `activate`.

    x: [batch, length, channels]; weight: [channels, 1, width] with odd width (as `torch.nn.Conv1d` holds it);
    bias: [channels]. sequence_id: [batch, length], -1 for padding; packed: False promises that each row
    holds at most one sequence, which allows a cheaper form. Returns [batch, length, channels].
    """
    form = depthwise_conv_reference if current_backend() == "reference" else depthwise_conv_torch
    mixed = form(x, weight, bias, sequence_id, packed)
    return silu(mixed) if activate else mixed
