"""Toeplitz mixing by tiles of the matrix, read from its lags, and the lags' gradients.

A lag's gradient is a sum along a diagonal of M's. Each program keeps one tile of that in a scratch of its own, which
stays in the cache, and reads it back along the diagonals.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from anymixer_kernels.row_scale import number_and_rows
from anymixer_kernels.sequences import starts as starts_of
from anymixer_kernels.triton_common import block_of, contiguous_like, dot_options
from anymixer_kernels.triton_factored import (
    MAX_HEADDIM_BLOCK,
    dense,
    load_rows,
    some_pair_mixes,
    store_rows,
    tile_of,
    tokens_of,
)  # fmt: skip

# Programs of the lags' gradients: they fill a large GPU, and their scratch fits its cache.
LAG_PROGRAMS = 1024


@triton.jit
def _product_kernel(
    lags, x, out, ids, starts, row_scales, col_scales, scale, length, nheads, headdim,
    lags_batch, x_batch, x_token, x_head, out_batch, out_token, out_head,
    TRANSPOSED: tl.constexpr, RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEPS: tl.constexpr, SKIPS: tl.constexpr, WIDTH: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of rows of Y for one head of one sample. lags: [batch, nheads, 2, length], below and above."""
    blocks = tl.cdiv(length, ROWS)
    block = tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks) % nheads
    batch = (tl.program_id(0) // blocks // nheads).to(tl.int64)
    if ids is not None:
        ids += batch * length
    if starts is not None:
        starts += batch * length
    if row_scales is not None:
        row_scales += batch * length
    if col_scales is not None:
        col_scales += batch * length
    lags += batch * lags_batch + head * 2 * length
    x += batch * x_batch + head * x_head
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    row, row_inside, row_id, row_first, row_scale = tokens_of(block, ids, starts, row_scales, length, ROWS)
    y = tl.zeros([ROWS, WIDTH], tl.float32)
    for step in range(STEPS):
        col, col_inside, col_id, col_first, col_scale = tokens_of(step, ids, None, col_scales, length, COLS)
        needed = True
        if SKIPS:
            needed = some_pair_mixes(row_id, col_id)
        if needed:
            lag = row[:, None] - col[None, :]
            if TRANSPOSED:
                lag = -lag
            place = row_first[:, None] + tl.abs(lag)
            counts = row_inside[:, None] & col_inside[None, :] & (place < length)
            if ids is not None:
                counts = counts & (row_id[:, None] == col_id[None, :]) & (col_id >= 0)[None, :]
            m = tl.load(lags + place + tl.where(lag >= 0, 0, length), mask=counts, other=0.0).to(tl.float32)
            if col_scales is not None:
                m = m * col_scale[None, :]
            x_tile = load_rows(x, col, col_inside, x_token, column, headdim)
            y += tl.dot(m.to(DOT), x_tile.to(DOT), input_precision=PRECISION)
    y = y * scale
    if row_scales is not None:
        y = y * row_scale[:, None]
    if RESIDUAL:
        y += load_rows(x, row, row_inside, x_token, column, headdim).to(tl.float32)
    store_rows(out + batch * out_batch + head * out_head, row, row_inside, out_token, column, headdim, y)


@triton.jit
def _diagonal(scratch, ids, row_id, place, counts, begin, length, COLS: tl.constexpr):
    """Entries [row, place] of a tile that begins at column `begin`, summed over rows where they count and the place
    belongs to the row's sequence."""
    counts = counts & (place >= begin) & (place < begin + COLS) & (place < length)
    if ids is not None:
        counts = counts & (tl.load(ids + place, mask=counts, other=-1).to(tl.int32) == row_id[:, None])
    line = tl.arange(0, place.shape[0])[:, None] * COLS
    return tl.sum(tl.load(scratch + line + (place - begin), mask=counts, other=0.0), axis=0)


@triton.jit
def _lag_kernel(
    x, z, grad, scratch, ids, starts, row_scales, scale, units, length, nheads, headdim,
    x_batch, x_token, x_head, z_batch, z_token, z_head,
    UNITS: tl.constexpr, LAGS: tl.constexpr, ROWS: tl.constexpr, ROW_STEPS: tl.constexpr,
    COLS: tl.constexpr, COL_STEPS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of blocks of lags, where M's is scale * X Z^T. grad: float32 [batch, nheads, 2, length]; scratch:
    float32 [programs, ROWS, COLS]. A unit is a block of lags of one head of one sample; a program does UNITS."""
    slot = tl.program_id(0).to(tl.int64)
    scratch += slot * ROWS * COLS
    blocks = tl.cdiv(length, LAGS)
    tile = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    for number in range(UNITS):
        unit = slot * UNITS + number
        # Beyond the last unit all masks are false.
        end = tl.where(unit < units, length, 0)
        block = (unit % blocks).to(tl.int32)
        head = (unit // blocks) % nheads
        batch = unit // blocks // nheads
        ids_here, starts_here, scales_here = ids, starts, row_scales
        if ids is not None:
            ids_here = ids + batch * length
        if starts is not None:
            starts_here = starts + batch * length
        if row_scales is not None:
            scales_here = row_scales + batch * length
        # The lags below from the last to the first, so that neighbouring threads read neighbouring entries.
        index = tl.arange(0, LAGS)
        rising, falling = block * LAGS + index, block * LAGS + LAGS - 1 - index
        below = tl.zeros([LAGS], tl.float32)
        above = tl.zeros([LAGS], tl.float32)
        for row_step in range(ROW_STEPS):
            row, row_inside, row_id, row_first, row_scale = tokens_of(
                row_step, ids_here, starts_here, scales_here, end, ROWS
            )  # fmt: skip
            if ids is not None:
                row_inside = row_inside & (row_id >= 0)
            lower = (row + row_first - (block * LAGS + LAGS - 1))[:, None] + index[None, :]
            upper = (row - row_first + block * LAGS)[:, None] + index[None, :]
            lower_counts = row_inside[:, None] & (lower >= 0) & (lower <= row[:, None])
            upper_counts = row_inside[:, None] & (upper > row[:, None])
            for col_step in range(COL_STEPS):
                begin = col_step * COLS
                needed = True
                if COL_STEPS > 1:
                    met = (lower_counts & (lower >= begin) & (lower < begin + COLS)) | (
                        upper_counts & (upper >= begin) & (upper < begin + COLS)
                    )
                    needed = tl.max(tl.max(met.to(tl.int32), axis=1), axis=0) > 0
                if needed:
                    col = begin + tl.arange(0, COLS)
                    dm = tl.zeros([ROWS, COLS], tl.float32)
                    for chunk in range(CHUNKS):
                        column = chunk * WIDTH + tl.arange(0, WIDTH)
                        x_tile = load_rows(
                            x + batch * x_batch + head * x_head, row, row_inside, x_token, column, headdim
                        )  # fmt: skip
                        z_tile = load_rows(
                            z + batch * z_batch + head * z_head, col, col < end, z_token, column, headdim
                        )
                        dm += tl.dot(x_tile.to(DOT), tl.trans(z_tile.to(DOT)), input_precision=PRECISION)
                    dm = dm * scale
                    if row_scales is not None:
                        dm = dm * row_scale[:, None]
                    tl.store(scratch + tile, dm)
                    tl.debug_barrier()
                    below += _diagonal(scratch, ids_here, row_id, lower, lower_counts, begin, end, COLS)
                    above += _diagonal(scratch, ids_here, row_id, upper, upper_counts, begin, end, COLS)
                    # The next tile takes the scratch.
                    tl.debug_barrier()
        lines = grad + (batch * nheads + head) * 2 * length
        tl.store(lines + falling, below, mask=falling < end)
        tl.store(lines + length + rising, above, mask=rising < end)


def _launch_product(lags, x, out, ids, starts, row_scales, col_scales, scale, *, transposed, residual) -> None:
    batch, length, nheads, headdim = x.shape
    options = dot_options(x.dtype)
    rows, cols = tile_of(length, options["DOT"])
    width = min(MAX_HEADDIM_BLOCK, block_of(headdim))
    if x.numel() == 0:
        return
    _product_kernel[(batch * nheads * triton.cdiv(length, rows), triton.cdiv(headdim, width))](
        lags, x, out, ids, starts, row_scales, col_scales, scale, length, nheads, headdim,
        0 if lags.shape[0] == 1 else lags.stride(0), *x.stride()[:3], *out.stride()[:3],
        TRANSPOSED=transposed, RESIDUAL=residual, ROWS=rows, COLS=cols, STEPS=triton.cdiv(length, cols),
        SKIPS=ids is not None and length > cols, WIDTH=width, num_warps=4, **options,
    )  # fmt: skip


def _launch_lags(x, z, ids, starts, row_scales, scale) -> Tensor:
    """float32 [batch, nheads, 2, length]: gradients of the lags below and above."""
    batch, length, nheads, headdim = x.shape
    options = dot_options(x.dtype)
    rows, cols = tile_of(length, options["DOT"])
    width = min(MAX_HEADDIM_BLOCK, block_of(headdim))
    units = batch * nheads * triton.cdiv(length, cols)
    per_program = triton.next_power_of_2(triton.cdiv(units, LAG_PROGRAMS))
    programs = triton.cdiv(units, per_program)
    grad = torch.empty(batch, nheads, 2, length, dtype=torch.float32, device=x.device)
    scratch = torch.empty(programs, rows, cols, dtype=torch.float32, device=x.device)
    if units:
        _lag_kernel[(programs,)](
            x, z, grad, scratch, ids, starts, row_scales, scale, units, length, nheads, headdim,
            *x.stride()[:3], *z.stride()[:3],
            UNITS=per_program, LAGS=cols, ROWS=rows, ROW_STEPS=triton.cdiv(length, rows), COLS=cols,
            COL_STEPS=triton.cdiv(length, cols), WIDTH=width, CHUNKS=triton.cdiv(headdim, width), num_warps=8,
            **options,
        )  # fmt: skip
    return grad


def toeplitz_triton(
    below: Tensor,
    above: Tensor,
    v: Tensor,
    sequence_id: Tensor | None,
    scale: Tensor | float,
    residual: bool,
) -> Tensor:
    """Arguments as in `anymixer_kernels.toeplitz.toeplitz_mix`."""
    number, rows = number_and_rows(scale)
    return _mix(below, above, v, sequence_id, rows, number, residual)


def _tables(below, above, sequence_id, row_scales):
    """Lags [batch or 1, nheads, 2, length], contiguous; ids; where each token's lags begin; scales."""
    lags = torch.stack([below, above], dim=-3).movedim(-1, -3)
    lags = (lags if lags.dim() == 4 else lags[None]).contiguous()
    ids = None if sequence_id is None else sequence_id.contiguous()
    starts = starts_of(ids) if ids is not None and below.dim() == 3 else None
    return lags, ids, starts, None if row_scales is None else row_scales.float().contiguous()


@torch.library.custom_op("anymixer::toeplitz", mutates_args=())
def _mix(
    below: Tensor, above: Tensor, v: Tensor, sequence_id: Tensor | None, row_scales: Tensor | None,
    scale: float, residual: bool,
) -> Tensor:  # fmt: skip
    y = contiguous_like(v)
    lags, ids, starts, scales = _tables(below, above, sequence_id, row_scales)
    _launch_product(lags, dense(v), y, ids, starts, scales, None, scale, transposed=False, residual=residual)
    return y


@_mix.register_fake
def _(below, above, v, sequence_id, row_scales, scale, residual):
    return contiguous_like(v)


@torch.library.custom_op("anymixer::toeplitz_backward", mutates_args=())
def _mix_backward(
    grad_y: Tensor, below: Tensor, above: Tensor, v: Tensor, sequence_id: Tensor | None, row_scales: Tensor | None,
    scale: float, residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_v = contiguous_like(v)
    lags, ids, starts, scales = _tables(below, above, sequence_id, row_scales)
    grad_y, v = dense(grad_y), dense(v)
    _launch_product(lags, grad_y, grad_v, ids, starts, None, scales, scale, transposed=True, residual=residual)
    of_lags = _launch_lags(grad_y, v, ids, starts, scales, scale)
    if below.dim() == 2:
        of_lags = of_lags.sum(0)
    of_below, of_above = of_lags.unbind(-2)
    return (
        of_below.transpose(-1, -2).to(below.dtype, copy=True).contiguous(),
        of_above.transpose(-1, -2).to(above.dtype, copy=True).contiguous(),
        grad_v,
    )


@_mix_backward.register_fake
def _(grad_y, below, above, v, sequence_id, row_scales, scale, residual):
    return contiguous_like(below), contiguous_like(above), contiguous_like(v)


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.residual = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad_y: Tensor):
    return *_mix_backward(grad_y, *ctx.saved_tensors, ctx.scale, ctx.residual), None, None, None, None


_mix.register_autograd(_gradients, setup_context=_keep)
