"""The depthwise convolution's Triton form: its launchers, which write where they are told, and the op."""

import torch
import triton
from torch import Tensor

from anymixer_kernels.depthwise_conv.triton_kernels import backward_kernel, forward_kernel
from anymixer_kernels.triton_common import contiguous_like

# Tokens of a program; the backward one computes du of some more.
FORWARD_TOKENS, BACKWARD_TOKENS = 32, 128
# Channels of a warp's thread: loads of 16 bytes.
THREAD_BYTES = 16


def launch_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sequence_id: Tensor | None,
    out: Tensor,
    *,
    activate: bool,
    causal: bool,
) -> None:
    """Write silu(conv(x)), or conv(x), into `out`; 0 where sequence_id is -1.

    x and out: [batch, length, channels], of any strides between tokens and between rows; weight: [channels, 1,
    width]; sequence_id: [batch, length].
    """
    x, ids = _dense(x), _dense(sequence_id)
    batch, length, channels = x.shape
    width, reach = _taps_and_reach(weight, causal)
    _check_output(out, x)
    block, tokens = _block(x), _tokens(FORWARD_TOKENS, length)
    grid = batch * triton.cdiv(length, tokens) * triton.cdiv(channels, block)
    if grid == 0:
        return
    forward_kernel[(grid,)](
        x, _by_tap(weight), bias, ids, out, length, channels, *x.stride()[:2], _row_stride(ids), *out.stride()[:2],
        WIDTH=width, REACH=reach, ACTIVATE=activate, TOKENS=tokens, BLOCK_C=block, num_warps=1,
    )  # fmt: skip


def launch_conv_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sequence_id: Tensor | None,
    grad_x_out: Tensor,
    *,
    activate: bool,
    causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """Write the gradient of x into `grad_x_out`, 0 where sequence_id is -1, and return those of weight and bias.

    Arguments as in `launch_conv`. grad_x_out must not overlap grad_y or x.
    """
    grad_y, x, ids = _dense(grad_y), _dense(x), _dense(sequence_id)
    batch, length, channels = x.shape
    width, reach = _taps_and_reach(weight, causal)
    _check_output(grad_x_out, x)
    block, tokens = _block(x), _tokens(BACKWARD_TOKENS, length)
    parts, blocks = batch * triton.cdiv(length, tokens), triton.cdiv(channels, block)
    # du before the first token of a row is never read.
    lead = 0 if length <= tokens else _fours(width - 1 - reach)
    lag = _fours(reach)
    # What a step of four tokens reads and what the next one writes never meet.
    ring = triton.next_power_of_2(lag + 8 + width - 1 - reach)
    rings = x.new_empty(parts * blocks * ring * block if activate else 0)
    sums = torch.empty(parts, triton.next_power_of_2(width + 1), channels, dtype=torch.float32, device=x.device)
    if parts * blocks:
        backward_kernel[(parts * blocks,)](
            grad_y, x, _by_tap(weight), bias, ids, rings, grad_x_out, sums, length, channels,
            *grad_y.stride()[:2], *x.stride()[:2], _row_stride(ids), *grad_x_out.stride()[:2],
            WIDTH=width, REACH=reach, ACTIVATE=activate, TOKENS=tokens, BLOCK_C=block,
            LEAD=lead, LAG=lag, RING=ring, SUMS=sums.shape[1], num_warps=1, num_stages=1,
        )  # fmt: skip
    total = sums.sum(0)
    grad_weight = total[:width].t().unsqueeze(1).to(weight.dtype, copy=True).contiguous()
    return grad_weight, None if bias is None else total[width].to(bias.dtype, copy=True)


def _dense(tensor):
    """The tensor, copied where its last axis has gaps."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _by_tap(weight: Tensor) -> Tensor:
    """[width, channels]: neighbouring channels lie side by side, as a program loads them."""
    return weight[:, 0].t().contiguous()


def _row_stride(ids: Tensor | None) -> int:
    return 0 if ids is None else ids.stride(0)


def _fours(tokens: int) -> int:
    return 4 * triton.cdiv(tokens, 4)


def _tokens(most: int, length: int) -> int:
    return min(most, max(4, triton.next_power_of_2(length)))


def _block(x: Tensor) -> int:
    return 32 * THREAD_BYTES // x.element_size()


def _taps_and_reach(weight: Tensor, causal: bool) -> tuple[int, int]:
    width = weight.shape[-1]
    return width, width - 1 if causal else width // 2


def _check_output(out: Tensor, x: Tensor) -> None:
    assert out.shape == x.shape and out.stride(-1) == 1, "an output must have the input's shape and no gaps"


@torch.library.custom_op("anymixer::depthwise_conv", mutates_args=())
def _op(
    x: Tensor, weight: Tensor, bias: Tensor | None, sequence_id: Tensor | None, activate: bool, causal: bool
) -> Tensor:
    out = contiguous_like(x)
    launch_conv(x, weight, bias, sequence_id, out, activate=activate, causal=causal)
    return out


@_op.register_fake
def _(x, weight, bias, sequence_id, activate, causal):
    return contiguous_like(x)


@torch.library.custom_op("anymixer::depthwise_conv_backward", mutates_args=())
def _op_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sequence_id: Tensor | None,
    activate: bool,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = contiguous_like(x)
    grad_weight, grad_bias = launch_conv_backward(
        grad_y, x, weight, bias, sequence_id, grad_x, activate=activate, causal=causal
    )
    return grad_x, grad_weight, weight.new_empty(0) if grad_bias is None else grad_bias


@_op_backward.register_fake
def _(grad_y, x, weight, bias, sequence_id, activate, causal):
    grad_x = contiguous_like(x)
    grad_bias = weight.new_empty(0) if bias is None else contiguous_like(bias)
    return grad_x, contiguous_like(weight), grad_bias


def _setup_context(ctx, inputs, output):
    x, weight, bias, sequence_id, ctx.activate, ctx.causal = inputs
    ctx.save_for_backward(x, weight, bias, sequence_id)


def _backward(ctx, grad_y):
    x, weight, bias, sequence_id = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _op_backward(grad_y, x, weight, bias, sequence_id, ctx.activate, ctx.causal)
    return grad_x, grad_weight, None if bias is None else grad_bias, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def depthwise_conv_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sequence_id: Tensor | None,
    activate: bool = True,
    causal: bool = False,
) -> Tensor:
    """Arguments as in `anymixer_kernels.depthwise_conv.depthwise_conv`; 0 where sequence_id is -1."""
    return _op(x, weight, bias, sequence_id, activate, causal)
