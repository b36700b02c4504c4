"""The depthwise convolution's Triton form: its launchers, which write where they are told, and the op."""

import torch
import triton
from torch import Tensor

from anymixer_kernels.depthwise_conv.triton_kernels import backward_kernel, forward_kernel
from anymixer_kernels.triton_common import contiguous_like

# Tokens of a row that a program goes through (at most), and channels of each of its threads, for a width of 7.
FORWARD_TOKENS, FORWARD_CHANNELS = 64, 4
BACKWARD_TOKENS, BACKWARD_CHANNELS = 128, 2
# Tokens that are loaded at once.
FORWARD_GROUP, BACKWARD_GROUP = 8, 8
# A thread's registers for 16-bit inputs, whole blocks of channels and widths up to 7, which hardly spill with as many:
# 21 programs share a multiprocessor of 65,536.
BACKWARD_REGISTERS = 96
# Parts of BACKWARD_TOKENS that share a program and its sums over tokens, and how many programs there must remain.
BACKWARD_PARTS, ENOUGH_PROGRAMS = 2, 7000


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

    x and out: [batch, length, channels], out with its tokens at equal distances; weight: [channels, 1, width];
    sequence_id: [batch, length].
    """
    x, ids = _evenly_spaced(x), None if sequence_id is None else sequence_id.contiguous()
    batch, length, channels = x.shape
    width, reach = _taps_and_reach(weight, causal)
    _check_output(out, x)
    group, block = _group_and_block(FORWARD_GROUP, FORWARD_CHANNELS, width)
    tokens = _tokens(FORWARD_TOKENS, group, length, width)
    grid = batch * triton.cdiv(length, tokens) * triton.cdiv(channels, block)
    if grid == 0:
        return
    forward_kernel[(grid,)](
        x, weight.contiguous(), bias, ids, out, length, CHANNELS=channels, X_TOKEN=x.stride(1), OUT_TOKEN=out.stride(1),
        WIDTH=width, REACH=reach, ACTIVATE=activate, TOKENS=tokens, GROUP=group, BLOCK_C=block, num_warps=1,
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

    Arguments as in `launch_conv`, grad_x_out as its out. grad_x_out must not overlap grad_y or x.
    """
    grad_y, x = _evenly_spaced(grad_y), _evenly_spaced(x)
    ids = None if sequence_id is None else sequence_id.contiguous()
    batch, length, channels = x.shape
    width, reach = _taps_and_reach(weight, causal)
    _check_output(grad_x_out, x)
    group, block = _group_and_block(BACKWARD_GROUP, BACKWARD_CHANNELS, width)
    tokens = _tokens(BACKWARD_TOKENS, group, length, width)
    parts, blocks = batch * triton.cdiv(length, tokens), triton.cdiv(channels, block)
    shared = BACKWARD_PARTS if parts * blocks >= BACKWARD_PARTS * ENOUGH_PROGRAMS else 1
    programs = triton.cdiv(parts, shared)
    sums_of_taps = torch.empty(programs, channels, 1, width, dtype=torch.float32, device=x.device)
    sums_of_bias = None if bias is None else torch.empty(programs, channels, dtype=torch.float32, device=x.device)
    if programs * blocks:
        backward_kernel[(programs * blocks,)](
            grad_y, x, weight.contiguous(), bias, ids, grad_x_out, sums_of_taps, sums_of_bias, batch, length,
            CHANNELS=channels, GRAD_Y_TOKEN=grad_y.stride(1), X_TOKEN=x.stride(1), GRAD_X_TOKEN=grad_x_out.stride(1),
            WIDTH=width, REACH=reach, ACTIVATE=activate, LEAD=0 if length <= tokens else width - 1 - reach,
            PARTS=shared, TOKENS=tokens, GROUP=group, BLOCK_C=block,
            BLOCK_T=triton.next_power_of_2(group + width - 1), num_warps=1,
            maxnreg=BACKWARD_REGISTERS if x.element_size() == 2 and channels % block == 0 and width <= 7 else None,
        )  # fmt: skip
    grad_weight = sums_of_taps.sum(0).to(weight.dtype)
    return grad_weight, None if bias is None or sums_of_bias is None else sums_of_bias.sum(0).to(bias.dtype)


def _has_even_spaces(tensor: Tensor) -> bool:
    batch, length, _ = tensor.shape
    return tensor.stride(2) == 1 and (batch == 1 or tensor.stride(0) == length * tensor.stride(1))


def _evenly_spaced(tensor: Tensor) -> Tensor:
    """The tensor, copied unless the channels of a token lie side by side, and each token as far from the one before,
    also across rows."""
    return tensor if _has_even_spaces(tensor) else tensor.contiguous()


def _group_and_block(group: int, channels: int, width: int) -> tuple[int, int]:
    """Tokens that are loaded at once, and channels of a program: less for wide windows, which fill the registers, and
    whose kernels take long to compile."""
    if width <= 8:
        return group, 32 * channels
    return (max(1, group // 2), 32 * channels) if width <= 16 else (max(1, group // 4), 32 * max(1, channels // 2))


def _tokens(most: int, group: int, length: int, width: int) -> int:
    """Tokens of a program: the power of two with the fewest steps in all, for what reaches into it costs some, too."""
    choices = [group]
    while choices[-1] < most:
        choices.append(2 * choices[-1])
    return min(choices, key=lambda tokens: triton.cdiv(length, tokens) * (tokens + width))


def _taps_and_reach(weight: Tensor, causal: bool) -> tuple[int, int]:
    width = weight.shape[-1]
    return width, width - 1 if causal else width // 2


def _check_output(out: Tensor, x: Tensor) -> None:
    assert out.shape == x.shape and _has_even_spaces(out), "an output must have the input's shape, and even spaces"


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
