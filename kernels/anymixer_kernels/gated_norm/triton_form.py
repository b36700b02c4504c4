"""The gated norm in one kernel each way: what a row needs is computed again from its two inputs, in float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from anymixer_kernels.triton_common import contiguous_like
from anymixer_kernels.triton_math import sigmoid, sum_of_pairs
from anymixer_kernels.triton_rows import as_rows, backward_programs, tile

# Numbers of a tile of whole rows and of a warp; backward programs enough to fill a large GPU several times over.
FORWARD_ENTRIES, FORWARD_WARP = 8192, 1024
BACKWARD_ENTRIES, BACKWARD_WARP, PROGRAMS = 2048, 512, 1024


@triton.jit
def _forward_kernel(
    x, gate, weight, out, rows, width, x_row, gate_row, out_row, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < width)
    values = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(values * values, axis=1) / width + eps)
    y = values * inverse_rms[:, None] * w * (g * sigmoid(g))
    tl.store(out + row * out_row + column, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_y, x, gate, weight, grad_x, grad_gate, sums, rows, width,
    grad_y_row, x_row, gate_row, grad_x_row, grad_gate_row, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """TILES tiles of ROWS rows; sums: [programs, width], the part of the weight's gradient."""
    column = tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0).to(tl.int64) * (TILES * ROWS)
    for step in range(TILES):
        row = first + step * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < width)
        values = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(grad_y + row * grad_y_row + column, mask=inside, other=0.0).to(tl.float32)
        s = sigmoid(g)
        dn = dy * (g * s)
        total_here = dn * values
        squares, along = tl.reduce((values * values, total_here * w), 1, sum_of_pairs)
        inverse_rms = tl.rsqrt(squares / width + eps)[:, None]
        mean = (along / width)[:, None] * inverse_rms
        n = values * inverse_rms
        total += tl.sum(total_here * inverse_rms, axis=0)
        dgate = dy * w * n * (s * (1.0 + g * (1.0 - s)))
        dx = inverse_rms * (dn * w - n * mean)
        tl.store(grad_gate + row * grad_gate_row + column, dgate.to(grad_gate.dtype.element_ty), mask=inside)
        tl.store(grad_x + row * grad_x_row + column, dx.to(grad_x.dtype.element_ty), mask=inside)
    place = tl.arange(0, BLOCK)
    tl.store(sums + tl.program_id(0).to(tl.int64) * width + place, total, mask=place < width)


def launch_gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """Write the gated norm into `out`. x, gate, out: [..., width], which flatten to rows of any stride."""
    x, gate, out = as_rows(x), as_rows(gate), out.view(-1, out.shape[-1])
    count, width = x.shape
    shape = tile(width, FORWARD_ENTRIES, FORWARD_WARP)
    if x.numel() == 0:
        return
    _forward_kernel[(triton.cdiv(count, shape["ROWS"]),)](
        x, gate, weight.contiguous(), out, count, width, x.stride(0), gate.stride(0), out.stride(0), eps,
        **shape,
    )  # fmt: skip


def launch_gated_norm_backward(
    grad_y: Tensor,
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float,
    grad_x_out: Tensor,
    grad_gate_out: Tensor,
) -> Tensor:
    """Write the gradients of x and gate into the last two arguments and return the weight's.

    All but weight: [..., width], which flatten to rows of any stride; no output overlaps an input.
    """
    grad_y, x, gate = as_rows(grad_y), as_rows(x), as_rows(gate)
    grad_x, grad_gate = (out.view(-1, out.shape[-1]) for out in (grad_x_out, grad_gate_out))
    count, width = x.shape
    programs, shape = backward_programs(count, tile(width, BACKWARD_ENTRIES, BACKWARD_WARP), PROGRAMS)
    sums = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    if x.numel():
        _backward_kernel[(programs,)](
            grad_y, x, gate, weight.contiguous(), grad_x, grad_gate, sums, count, width,
            grad_y.stride(0), x.stride(0), gate.stride(0), grad_x.stride(0), grad_gate.stride(0), eps,
            num_stages=1, **shape,
        )  # fmt: skip
    return sums.sum(0).to(weight.dtype)


@torch.library.custom_op("anymixer::gated_norm", mutates_args=())
def _op(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = contiguous_like(x)
    launch_gated_norm(x, gate, weight, eps, out)
    return out


@_op.register_fake
def _(x, gate, weight, eps):
    return contiguous_like(x)


@torch.library.custom_op("anymixer::gated_norm_backward", mutates_args=())
def _op_backward(grad_y: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_gate = contiguous_like(x), contiguous_like(gate)
    return grad_x, grad_gate, launch_gated_norm_backward(grad_y, x, gate, weight, eps, grad_x, grad_gate)


@_op_backward.register_fake
def _(grad_y, x, gate, weight, eps):
    return contiguous_like(x), contiguous_like(gate), contiguous_like(weight)


def _setup_context(ctx, inputs, output):
    x, gate, weight, ctx.eps = inputs
    ctx.save_for_backward(x, gate, weight)


def _backward(ctx, grad_y):
    return *_op_backward(grad_y, *ctx.saved_tensors, ctx.eps), None


_op.register_autograd(_backward, setup_context=_setup_context)


def gated_norm_triton(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Arguments as in `anymixer_kernels.gated_norm.gated_norm`."""
    return _op(x, gate, weight, eps)
