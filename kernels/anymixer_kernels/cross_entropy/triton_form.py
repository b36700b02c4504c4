"""The cross entropy's Triton form: a program goes through the classes of one row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from anymixer_kernels.triton_common import block_of

# Classes read at once, by as many warps.
BLOCK, WARPS = 4096, 8


@triton.jit
def _forward_kernel(
    logits, targets, losses, sums, row_stride, CLASSES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums: of each row the largest logit, and the logarithm of the sum of exp(logit - largest), for the backward pass:
    two numbers, because one would lose the digits of large logits."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    most = -float("inf")
    total = 0.0
    for start in range(0, CLASSES, BLOCK):
        column = start + tl.arange(0, BLOCK)
        part = tl.load(logits + column, mask=column < CLASSES, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(most, tl.max(part, axis=0))
        # Where all so far is minus infinity, the difference of two of them would be NaN.
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(most - shift) + tl.sum(tl.exp(part - shift), axis=0)
        most = higher
    target = tl.load(targets + row)
    # A class that does not exist is an error of the caller's, which NaN shows.
    chosen = tl.load(logits + tl.maximum(target, 0), mask=target < CLASSES, other=float("nan")).to(tl.float32)
    tl.store(losses + row, tl.where(target >= 0, (most - chosen) + tl.log(total), 0.0))
    tl.store(sums + row * 2, most)
    tl.store(sums + row * 2 + 1, tl.log(total))


@triton.jit
def _backward_kernel(
    grad_losses, logits, targets, sums, grad_logits, row_stride, grad_loss_stride,
    CLASSES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < CLASSES
    target = tl.load(targets + row)
    grad = tl.where(target >= 0, tl.load(grad_losses + row * grad_loss_stride), 0.0)
    part = tl.load(logits + row * row_stride + column, mask=inside, other=-float("inf")).to(tl.float32)
    probability = tl.exp((part - tl.load(sums + row * 2)) - tl.load(sums + row * 2 + 1))
    of_logit = grad * (probability - tl.where(column == target, 1.0, 0.0))
    tl.store(grad_logits + row * CLASSES + column, of_logit.to(grad_logits.dtype.element_ty), mask=inside)


@torch.library.custom_op("anymixer::cross_entropy", mutates_args=())
def _op(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    rows, classes = logits.shape
    losses, sums = _outputs(logits)
    logits = _dense(logits)
    if rows:
        _forward_kernel[(rows,)](
            logits, targets.contiguous(), losses, sums, logits.stride(0),
            CLASSES=classes, BLOCK=min(BLOCK, block_of(classes)), num_warps=WARPS,
        )  # fmt: skip
    return losses, sums


@_op.register_fake
def _(logits, targets):
    return _outputs(logits)


@torch.library.custom_op("anymixer::cross_entropy_backward", mutates_args=())
def _op_backward(grad_losses: Tensor, logits: Tensor, targets: Tensor, sums: Tensor) -> Tensor:
    rows, classes = logits.shape
    grad_logits = torch.empty(rows, classes, dtype=logits.dtype, device=logits.device)
    logits, block = _dense(logits), min(BLOCK, block_of(classes))
    if rows:
        _backward_kernel[(rows, triton.cdiv(classes, block))](
            grad_losses, logits, targets.contiguous(), sums, grad_logits, logits.stride(0), grad_losses.stride(0),
            CLASSES=classes, BLOCK=block, num_warps=WARPS,
        )  # fmt: skip
    return grad_logits


@_op_backward.register_fake
def _(grad_losses, logits, targets, sums):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _outputs(logits: Tensor) -> tuple[Tensor, Tensor]:
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    return losses, torch.empty(logits.shape[0], 2, dtype=torch.float32, device=logits.device)


def _dense(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_losses, _):
    return _op_backward(grad_losses, *ctx.saved_tensors), None


_op.register_autograd(_backward, setup_context=_setup_context)


def cross_entropy_triton(logits: Tensor, targets: Tensor) -> Tensor:
    """Arguments as in `cross_entropy`."""
    losses, _ = _op(logits, targets)
    return losses
