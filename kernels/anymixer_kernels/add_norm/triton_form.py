"""The residual sum and its LayerNorm in one kernel each way, in float32; the sum is not kept but computed again."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from anymixer_kernels.triton_common import contiguous_like
from anymixer_kernels.triton_rows import as_rows, backward_programs, tile

# Numbers of a tile of whole rows.
FORWARD_ENTRIES, BACKWARD_ENTRIES = 4096, 4096


@triton.jit
def _normalised(residual, branch, row, column, inside, residual_row, branch_row, width, eps):
    """The normalised sum of a tile, and 1 / its standard deviation."""
    summed = tl.load(residual + row * residual_row + column, mask=inside, other=0.0).to(tl.float32)
    summed += tl.load(branch + row * branch_row + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(summed, axis=1) / width
    centred = tl.where(inside, summed - mean[:, None], 0.0)
    inverse_std = tl.rsqrt(tl.sum(centred * centred, axis=1) / width + eps)[:, None]
    return centred * inverse_std, inverse_std


@triton.jit
def _forward_kernel(
    residual, branch, weight, bias, out, rows, width, residual_row, branch_row, out_row, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < width)
    n, _ = _normalised(residual, branch, row, column, inside, residual_row, branch_row, width, eps)
    y = n * tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out + row * out_row + column, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_y, residual, branch, weight, grad_residual, grad_branch, sums, rows, width,
    grad_y_row, residual_row, branch_row, grad_residual_row, grad_branch_row, eps,
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
        n, inverse_std = _normalised(residual, branch, row, column, inside, residual_row, branch_row, width, eps)
        of_weight += tl.sum(dy * n, axis=0)
        of_bias += tl.sum(dy, axis=0)
        dn = dy * w
        along = (tl.sum(dn * n, axis=1) / width)[:, None]
        mean = (tl.sum(dn, axis=1) / width)[:, None]
        grad = inverse_std * (dn - mean - n * along)
        tl.store(grad_residual + row * grad_residual_row + column, grad.to(grad_residual.dtype.element_ty), mask=inside)
        if grad_branch is not None:
            tl.store(grad_branch + row * grad_branch_row + column, grad.to(grad_branch.dtype.element_ty), mask=inside)
    place = tl.arange(0, BLOCK)
    places = sums + tl.program_id(0).to(tl.int64) * (2 * width) + place
    tl.store(places, of_weight, mask=place < width)
    tl.store(places + width, of_bias, mask=place < width)


def launch_add_norm(
    residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor
) -> None:
    """Write LayerNorm(residual + branch) into `out`. All but the parameters: [..., width], which flatten to rows of
    any stride."""
    residual, branch, out = as_rows(residual), as_rows(branch), out.view(-1, out.shape[-1])
    count, width = residual.shape
    shape = tile(width, FORWARD_ENTRIES)
    if residual.numel() == 0:
        return
    _forward_kernel[(triton.cdiv(count, shape["ROWS"]),)](
        residual, branch, weight.contiguous(), None if bias is None else bias.contiguous(), out, count, width,
        residual.stride(0), branch.stride(0), out.stride(0), eps, **shape,
    )  # fmt: skip


def launch_add_norm_backward(
    grad_y: Tensor,
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
    grad_residual = grad_residual_out.view(-1, grad_residual_out.shape[-1])
    grad_branch = None if grad_branch_out is None else grad_branch_out.view(-1, grad_branch_out.shape[-1])
    count, width = residual.shape
    programs, shape = backward_programs(count, width, BACKWARD_ENTRIES)
    sums = torch.empty(programs, 2, width, dtype=torch.float32, device=residual.device)
    if residual.numel():
        _backward_kernel[(programs,)](
            grad_y, residual, branch, weight.contiguous(), grad_residual, grad_branch, sums, count, width,
            grad_y.stride(0), residual.stride(0), branch.stride(0), grad_residual.stride(0),
            0 if grad_branch is None else grad_branch.stride(0), eps,
            num_stages=1, **shape,
        )  # fmt: skip
    total = sums.sum(0)
    return total[0].to(weight.dtype, copy=True), total[1].to(weight.dtype, copy=True)


@torch.library.custom_op("anymixer::add_norm", mutates_args=())
def _op(
    residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    out = torch.empty(residual.shape, dtype=dtype, device=residual.device)
    launch_add_norm(residual, branch, weight, bias, eps, out)
    return out


@_op.register_fake
def _(residual, branch, weight, bias, eps, dtype):
    return torch.empty(residual.shape, dtype=dtype, device=residual.device)


@torch.library.custom_op("anymixer::add_norm_backward", mutates_args=())
def _op_backward(
    grad_y: Tensor, residual: Tensor, branch: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_residual, grad_branch = contiguous_like(residual), _branch_like(residual, branch)
    second = grad_branch if branch.dtype != residual.dtype else None
    of_weight, of_bias = launch_add_norm_backward(grad_y, residual, branch, weight, eps, grad_residual, second)
    return grad_residual, grad_branch, of_weight, of_bias


@_op_backward.register_fake
def _(grad_y, residual, branch, weight, eps):
    return contiguous_like(residual), _branch_like(residual, branch), contiguous_like(weight), contiguous_like(weight)


def _branch_like(residual: Tensor, branch: Tensor) -> Tensor:
    """For branch's gradient; empty where residual's is the same."""
    return branch.new_empty(0) if branch.dtype == residual.dtype else contiguous_like(branch)


def _setup_context(ctx, inputs, output):
    residual, branch, weight, bias, ctx.eps, _ = inputs
    ctx.save_for_backward(residual, branch, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad_y):
    residual, branch, weight = ctx.saved_tensors
    grad_residual, grad_branch, of_weight, of_bias = _op_backward(grad_y, residual, branch, weight, ctx.eps)
    if branch.dtype == residual.dtype:
        grad_branch = grad_residual
    return grad_residual, grad_branch, of_weight, None if ctx.bias_dtype is None else of_bias, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def add_norm_triton(
    residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """Arguments as in `anymixer_kernels.add_norm.add_norm`."""
    return _op(residual, branch, weight, bias, eps, dtype)
