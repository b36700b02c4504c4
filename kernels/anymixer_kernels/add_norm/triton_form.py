"""The residual sum and its LayerNorm in one kernel each way, in float32; the sum is not kept but computed again."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from anymixer_kernels.triton_common import contiguous_like
from anymixer_kernels.triton_math import sum_of_pairs
from anymixer_kernels.triton_rows import as_rows, backward_programs, tile

# Numbers of a tile of whole rows and of a warp; backward programs enough to fill a large GPU several times over.
FORWARD_ENTRIES, FORWARD_WARP = 4096, 512
BACKWARD_ENTRIES, BACKWARD_WARP, PROGRAMS = 4096, 1024, 2048


@triton.jit
def _summed(residual, branch, row, column, inside, residual_row, branch_row):
    summed = tl.load(residual + row * residual_row + column, mask=inside, other=0.0).to(tl.float32)
    return summed + tl.load(branch + row * branch_row + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(
    residual, branch, weight, bias, out, copy, rows, width, residual_row, branch_row, out_row, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < width)
    summed = _summed(residual, branch, row, column, inside, residual_row, branch_row)
    mean = tl.sum(summed, axis=1) / width
    centred = tl.where(inside, summed - mean[:, None], 0.0)
    n = centred * tl.rsqrt(tl.sum(centred * centred, axis=1) / width + eps)[:, None]
    y = n * tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out + row * out_row + column, y.to(out.dtype.element_ty), mask=inside)
    if copy is not None:
        tl.store(copy + row * out_row + column, y.to(copy.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_y, grad_copy, residual, branch, weight, grad_residual, grad_branch, sums, rows, width,
    grad_y_row, grad_copy_row, residual_row, branch_row, grad_residual_row, grad_branch_row, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """TILES tiles of ROWS rows; sums: [programs, 2, width], the parts of the gradients of weight and bias."""
    column = tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    of_weight = tl.zeros([BLOCK], tl.float32)
    of_bias = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0).to(tl.int64) * (TILES * ROWS)
    for step in range(TILES):
        row = first + step * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < width)
        dy = tl.load(grad_y + row * grad_y_row + column, mask=inside, other=0.0).to(tl.float32)
        if grad_copy is not None:
            dy += tl.load(grad_copy + row * grad_copy_row + column, mask=inside, other=0.0).to(tl.float32)
        summed = _summed(residual, branch, row, column, inside, residual_row, branch_row)
        dn = dy * w
        # What crosses warps takes most of the time: two sums at once.
        total, of_mean = tl.reduce((summed, dn), 1, sum_of_pairs)
        centred = tl.where(inside, summed - (total / width)[:, None], 0.0)
        squares, along = tl.reduce((centred * centred, centred * dn), 1, sum_of_pairs)
        inverse_std = tl.rsqrt(squares / width + eps)[:, None]
        n = centred * inverse_std
        of_weight += tl.sum(dy * n, axis=0)
        of_bias += tl.sum(dy, axis=0)
        grad = inverse_std * (dn - (of_mean / width)[:, None] - n * ((along / width)[:, None] * inverse_std))
        tl.store(grad_residual + row * grad_residual_row + column, grad.to(grad_residual.dtype.element_ty), mask=inside)
        if grad_branch is not None:
            tl.store(grad_branch + row * grad_branch_row + column, grad.to(grad_branch.dtype.element_ty), mask=inside)
    place = tl.arange(0, BLOCK)
    places = sums + tl.program_id(0).to(tl.int64) * (2 * width) + place
    tl.store(places, of_weight, mask=place < width)
    tl.store(places + width, of_bias, mask=place < width)


def launch_add_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
    copy: Tensor | None = None,
) -> None:
    """Write LayerNorm(residual + branch) into `out`, and rounded to copy's dtype into `copy`, which has out's strides.
    All but the parameters: [..., width], which flatten to rows of any stride."""
    residual, branch, out = as_rows(residual), as_rows(branch), out.view(-1, out.shape[-1])
    count, width = residual.shape
    shape = tile(width, FORWARD_ENTRIES, FORWARD_WARP)
    if residual.numel() == 0:
        return
    _forward_kernel[(triton.cdiv(count, shape["ROWS"]),)](
        residual, branch, weight.contiguous(), None if bias is None else bias.contiguous(), out, copy, count, width,
        residual.stride(0), branch.stride(0), out.stride(0), eps, **shape,
    )  # fmt: skip


def launch_add_norm_backward(
    grad_y: Tensor,
    grad_copy: Tensor | None,
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    eps: float,
    grad_residual_out: Tensor,
    grad_branch_out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Write the gradient of the sum into the last two arguments, in their dtypes (the second may be None), and return
    those of weight and bias, in weight's dtype. No output overlaps an input."""
    grad_y, residual, branch = as_rows(grad_y), as_rows(residual), as_rows(branch)
    grad_copy = None if grad_copy is None else as_rows(grad_copy)
    grad_residual = grad_residual_out.view(-1, grad_residual_out.shape[-1])
    grad_branch = None if grad_branch_out is None else grad_branch_out.view(-1, grad_branch_out.shape[-1])
    count, width = residual.shape
    programs, shape = backward_programs(count, tile(width, BACKWARD_ENTRIES, BACKWARD_WARP), PROGRAMS)
    sums = torch.empty(programs, 2, width, dtype=torch.float32, device=residual.device)
    if residual.numel():
        _backward_kernel[(programs,)](
            grad_y, grad_copy, residual, branch, weight.contiguous(), grad_residual, grad_branch, sums, count, width,
            grad_y.stride(0), 0 if grad_copy is None else grad_copy.stride(0), residual.stride(0), branch.stride(0),
            grad_residual.stride(0), 0 if grad_branch is None else grad_branch.stride(0), eps,
            num_stages=1, **shape,
        )  # fmt: skip
    total = sums.sum(0)
    return total[0].to(weight.dtype, copy=True), total[1].to(weight.dtype, copy=True)


@torch.library.custom_op("anymixer::add_norm", mutates_args=())
def _op(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    copy_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    out, copy = _outputs(residual, dtype, copy_dtype)
    launch_add_norm(residual, branch, weight, bias, eps, out, None if copy_dtype is None else copy)
    return out, copy


@_op.register_fake
def _(residual, branch, weight, bias, eps, dtype, copy_dtype):
    return _outputs(residual, dtype, copy_dtype)


def _outputs(residual: Tensor, dtype: torch.dtype, copy_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """For the norm and its copy, which is empty where none is asked for."""
    shape = (0,) if copy_dtype is None else residual.shape
    copy = torch.empty(shape, dtype=copy_dtype or dtype, device=residual.device)
    return torch.empty(residual.shape, dtype=dtype, device=residual.device), copy


@torch.library.custom_op("anymixer::add_norm_backward", mutates_args=())
def _op_backward(
    grad_y: Tensor, grad_copy: Tensor | None, residual: Tensor, branch: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_residual, grad_branch = contiguous_like(residual), _branch_like(residual, branch)
    second = grad_branch if branch.dtype != residual.dtype else None
    of_weight, of_bias = launch_add_norm_backward(
        grad_y, grad_copy, residual, branch, weight, eps, grad_residual, second
    )
    return grad_residual, grad_branch, of_weight, of_bias


@_op_backward.register_fake
def _(grad_y, grad_copy, residual, branch, weight, eps):
    return contiguous_like(residual), _branch_like(residual, branch), contiguous_like(weight), contiguous_like(weight)


def _branch_like(residual: Tensor, branch: Tensor) -> Tensor:
    """For branch's gradient; empty where residual's is the same."""
    return branch.new_empty(0) if branch.dtype == residual.dtype else contiguous_like(branch)


def _setup_context(ctx, inputs, output):
    residual, branch, weight, bias, ctx.eps, _, _ = inputs
    ctx.save_for_backward(residual, branch, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype
    # Else zeros are written, and read, for an output that nobody used.
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y, grad_copy):
    residual, branch, weight = ctx.saved_tensors
    if grad_y is None:
        grad_y, grad_copy = grad_copy, None
    if grad_y is None:
        return (None,) * 7
    grads = _op_backward(grad_y, grad_copy, residual, branch, weight, ctx.eps)
    grad_residual, grad_branch, of_weight, of_bias = grads
    if branch.dtype == residual.dtype:
        grad_branch = grad_residual
    return grad_residual, grad_branch, of_weight, None if ctx.bias_dtype is None else of_bias, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def add_norm_triton(
    residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """Arguments as in `anymixer_kernels.add_norm.add_norm`."""
    return _op(residual, branch, weight, bias, eps, dtype, None)[0]


def add_norm_and_copy_triton(
    residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float, copy_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Arguments as in `anymixer_kernels.add_norm.add_norm_and_copy`."""
    return _op(residual, branch, weight, bias, eps, residual.dtype, copy_dtype)
