"""Depthwise convolution over the tokens of each sequence, centred (odd width) or causal, with an optional SiLU.

The window of a token never reaches padding or another sequence: outside its own sequence the input is zero,
exactly as if the sequence stood alone.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from anymixer_kernels.backend import current_backend, takes_triton
from anymixer_kernels.depthwise_conv.reference import depthwise_conv_reference
from anymixer_kernels.depthwise_conv.torch_form import depthwise_conv_torch

__all__ = ["depthwise_conv", "depthwise_conv_reference", "depthwise_conv_step", "depthwise_conv_torch"]

# The widest kernel of the Triton form, which writes out its taps one by one.
UNROLLED = 32


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    sequence_id: Tensor | None = None,
    packed: bool = True,
    activate: bool = True,
    causal: bool = False,
) -> Tensor:
    """silu(conv(x)), channel by channel; conv(x) alone without `activate`.

    x: [batch, length, channels]; weight: [channels, 1, width] (as `torch.nn.Conv1d` holds it), centred on the token,
    or with `causal` ending at it;
    bias: [channels]. sequence_id: [batch, length], -1 for padding; packed: False promises that each row
    holds at most one sequence, which allows a cheaper form. Returns [batch, length, channels].
    """
    unsupported = f"more than {UNROLLED} taps" if weight.shape[-1] > UNROLLED else None
    if takes_triton(x, "depthwise_conv", unsupported):
        from anymixer_kernels.depthwise_conv.triton_form import depthwise_conv_triton

        return depthwise_conv_triton(x, weight, bias, sequence_id, activate, causal)
    form = depthwise_conv_reference if current_backend() == "reference" else depthwise_conv_torch
    mixed = form(x, weight, bias, sequence_id, packed, causal)
    return silu(mixed) if activate else mixed


def depthwise_conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor, *, activate: bool = True
) -> tuple[Tensor, Tensor]:
    """One token of the causal form: x [batch, channels] and the width - 1 inputs before it, [batch, width - 1,
    channels] -> the result [batch, channels], and the inputs before the next token."""
    window = torch.cat([before, x[:, None]], dim=1)
    mixed = (window * weight[:, 0].T.to(x.dtype)).sum(dim=1)
    mixed = mixed if bias is None else mixed + bias.to(x.dtype)
    return silu(mixed) if activate else mixed, window[:, 1:]
