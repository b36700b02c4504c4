"""Y = scale * M V (+ V) for matrices whose entries are a function of one factor per row and one per column.

Tiles of M live in registers. An op brings two device functions, inlined into the kernels below:

    entries(a, b, row_begin, col_begin, row_first, col_first, constant, DIMS, DOT, PRECISION) -> a tile of M
    gradient(dm, a, b, the same) -> gradients of a, of b (or zeros) and, by rows, of the constant

a [rows, dims] and b [columns, dims] are float32 factors of a tile, of which DIMS dims are real; row_begin and
col_begin the places of its corner in the row of tokens; row_first and col_first where each token's sequence begins.

M transposed is the same function with rows and columns exchanged, up to a sign. So the gradient of V is the product
again, and the gradient of k that of q, with the operands' roles exchanged; no kernel needs atomics.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from anymixer_kernels.triton_common import block_of, dot_options

MAX_HEADDIM_BLOCK = 128
# Rows and columns of a tile, as registers allow: where a row of tokens is one tile wide, nothing else is kept
# beside it; exact float32 products are unrolled multiply-adds.
ONE_TILE, TILE, FLOAT32_TILE = (64, 128), (64, 64), (32, 32)


@triton.jit
def tokens_of(block, ids, starts, scales, length, BLOCK: tl.constexpr):
    """A block of tokens: their places, which of them exist, sequence ids, where the sequences begin, scales."""
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < length
    own = tl.zeros([BLOCK], tl.int32)
    first = tl.zeros([BLOCK], tl.int32)
    scale = tl.full([BLOCK], 1.0, tl.float32)
    if ids is not None:
        own = tl.load(ids + token, mask=inside, other=-1).to(tl.int32)
    if starts is not None:
        first = tl.load(starts + token, mask=inside, other=0).to(tl.int32)
    if scales is not None:
        scale = tl.load(scales + token, mask=inside, other=0.0).to(tl.float32)
    return token, inside, own, first, scale


@triton.jit
def some_pair_mixes(row_id, col_id):
    """Whether a tile of pairs of tokens has one of a single sequence."""
    mixes = (row_id[:, None] == col_id[None, :]) & (col_id >= 0)[None, :]
    return tl.max(tl.max(mixes.to(tl.int32), axis=1), axis=0) > 0


@triton.jit
def load_rows(pointer, token, inside, stride, column, width):
    """Entries [token, column] of a matrix with rows `stride` apart, 0 beyond its end."""
    places = pointer + token.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(places, mask=inside[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def store_rows(pointer, token, inside, stride, column, width, values):
    """Undo `load_rows`."""
    places = pointer + token.to(tl.int64)[:, None] * stride + column[None, :]
    mask = inside[:, None] & (column < width)[None, :]
    tl.store(places, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def column_of(tile, index):
    """tile[:, index]: an index that is no constant."""
    column = tl.arange(0, tile.shape[1])
    return tl.sum(tl.where(column[None, :] == index, tile, 0.0), axis=1)


@triton.jit
def _product_kernel(
    a, b, x, out, shift, ids, starts, row_scales, col_scales, constant, scale, length, nheads, headdim,
    a_batch, a_token, a_head, b_batch, b_token, b_head, x_batch, x_token, x_head, out_batch, out_token, out_head,
    ENTRIES: tl.constexpr, RESIDUAL: tl.constexpr, DIMS: tl.constexpr, DIM_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEPS: tl.constexpr, SKIPS: tl.constexpr, WIDTH: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of rows of Y for one head of one sample."""
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
    a += batch * a_batch + head * a_head
    b += batch * b_batch + head * b_head
    x += batch * x_batch + head * x_head
    dim = tl.arange(0, DIM_BLOCK)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    if shift is not None:
        constant = tl.load(shift).to(tl.float32)
    row, row_inside, row_id, row_first, row_scale = tokens_of(block, ids, starts, row_scales, length, ROWS)
    a_tile = load_rows(a, row, row_inside, a_token, dim, DIMS).to(tl.float32)
    y = tl.zeros([ROWS, WIDTH], tl.float32)
    for step in range(STEPS):
        col, col_inside, col_id, col_first, col_scale = tokens_of(step, ids, starts, col_scales, length, COLS)
        needed = True
        if SKIPS:
            needed = some_pair_mixes(row_id, col_id)
        if needed:
            b_tile = load_rows(b, col, col_inside, b_token, dim, DIMS).to(tl.float32)
            m = ENTRIES(
                a_tile, b_tile, block * ROWS, step * COLS, row_first, col_first, constant, DIMS, DOT, PRECISION
            )  # fmt: skip
            if ids is not None:
                m = tl.where((row_id[:, None] == col_id[None, :]) & (col_id >= 0)[None, :], m, 0.0)
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
def _gradient_kernel(
    a, b, x, z, grad_a, grad_b, grad_shift, shift, ids, starts, row_scales, col_scales, constant, scale,
    length, nheads, headdim,
    a_batch, a_token, a_head, b_batch, b_token, b_head, x_batch, x_token, x_head, z_batch, z_token, z_head,
    da_batch, da_token, da_head, db_batch, db_token, db_head,
    GRADIENT: tl.constexpr, DIMS: tl.constexpr, DIM_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEPS: tl.constexpr, SKIPS: tl.constexpr, WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of rows of a, where M's is scale * X Z^T; of b too where one block is all rows."""
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
    a += batch * a_batch + head * a_head
    b += batch * b_batch + head * b_head
    x += batch * x_batch + head * x_head
    z += batch * z_batch + head * z_head
    dim = tl.arange(0, DIM_BLOCK)
    if shift is not None:
        constant = tl.load(shift).to(tl.float32)
    row, row_inside, row_id, row_first, row_scale = tokens_of(block, ids, starts, row_scales, length, ROWS)
    a_tile = load_rows(a, row, row_inside, a_token, dim, DIMS).to(tl.float32)
    da = tl.zeros([ROWS, DIM_BLOCK], tl.float32)
    of_shift = tl.zeros([ROWS], tl.float32)
    for step in range(STEPS):
        col, col_inside, col_id, col_first, col_scale = tokens_of(step, ids, starts, col_scales, length, COLS)
        needed = True
        if SKIPS:
            needed = some_pair_mixes(row_id, col_id)
        if needed:
            b_tile = load_rows(b, col, col_inside, b_token, dim, DIMS).to(tl.float32)
            dm = tl.zeros([ROWS, COLS], tl.float32)
            for chunk in range(CHUNKS):
                column = chunk * WIDTH + tl.arange(0, WIDTH)
                x_tile = load_rows(x, row, row_inside, x_token, column, headdim).to(DOT)
                z_tile = load_rows(z, col, col_inside, z_token, column, headdim).to(DOT)
                dm += tl.dot(x_tile, tl.trans(z_tile), input_precision=PRECISION)
            dm = dm * scale
            if row_scales is not None:
                dm = dm * row_scale[:, None]
            if col_scales is not None:
                dm = dm * col_scale[None, :]
            if ids is not None:
                dm = tl.where((row_id[:, None] == col_id[None, :]) & (col_id >= 0)[None, :], dm, 0.0)
            da_part, db_part, shift_part = GRADIENT(
                dm, a_tile, b_tile, block * ROWS, step * COLS, row_first, col_first, constant, DIMS, DOT, PRECISION
            )  # fmt: skip
            da += da_part
            of_shift += shift_part
            if grad_b is not None:
                db_places = grad_b + batch * db_batch + head * db_head
                store_rows(db_places, col, col_inside, db_token, dim, DIMS, db_part)
    store_rows(grad_a + batch * da_batch + head * da_head, row, row_inside, da_token, dim, DIMS, da)
    if grad_shift is not None:
        tl.store(grad_shift + tl.program_id(0), tl.sum(of_shift, axis=0))


@dataclass(frozen=True)
class Matrix:
    """M, a function of row factors a and column factors b, [batch, length, nheads, dims] each, last axis of stride 1.

    constant, or in its place the 0-dimensional tensor `shift`: what the op's functions take. ids, starts: [batch,
    length] sequence ids and the places at which the sequences begin, contiguous, or None. row_scales, col_scales:
    float32 [batch, length], contiguous, or None, which multiply M, as the number `scale` does.
    """

    a: Tensor
    b: Tensor
    shift: Tensor | None
    constant: float
    ids: Tensor | None
    starts: Tensor | None
    row_scales: Tensor | None
    col_scales: Tensor | None
    scale: float

    def transposed(self, sign: float) -> "Matrix":
        """M^T, given that the op's function of exchanged factors is `sign` times the transpose."""
        return replace(
            self, a=self.b, b=self.a, row_scales=self.col_scales, col_scales=self.row_scales, scale=sign * self.scale
        )

    def skips(self, cols: int) -> bool:
        """Whether tiles of `cols` columns may hold no pair of tokens of one sequence, and be left out."""
        return self.ids is not None and self.a.shape[1] > cols


def dense(tensor: Tensor) -> Tensor:
    """The tensor, copied where its last axis has gaps."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def launch_product(entries: Callable, matrix: Matrix, x: Tensor, out: Tensor, *, residual: bool) -> None:
    """Write M X, and + X with `residual`, into `out`; x, out: [batch, length, nheads, headdim], last stride 1."""
    batch, length, nheads, headdim = x.shape
    options = dot_options(x.dtype)
    rows, cols = tile_of(length, options["DOT"])
    width = min(MAX_HEADDIM_BLOCK, block_of(headdim))
    if x.numel() == 0:
        return
    _product_kernel[(batch * nheads * triton.cdiv(length, rows), triton.cdiv(headdim, width))](
        matrix.a, matrix.b, x, out, matrix.shift, matrix.ids, matrix.starts, matrix.row_scales, matrix.col_scales,
        matrix.constant, matrix.scale, length, nheads, headdim,
        *matrix.a.stride()[:3], *matrix.b.stride()[:3], *x.stride()[:3], *out.stride()[:3],
        ENTRIES=entries, RESIDUAL=residual, DIMS=matrix.a.shape[-1], DIM_BLOCK=block_of(matrix.a.shape[-1]),
        ROWS=rows, COLS=cols, STEPS=triton.cdiv(length, cols), SKIPS=matrix.skips(cols), WIDTH=width, num_warps=4,
        **options,
    )  # fmt: skip


def launch_gradient(
    gradient: Callable, matrix: Matrix, x: Tensor, z: Tensor, grad_a: Tensor, grad_b: Tensor | None
) -> Tensor | None:
    """Write the gradient of a into `grad_a`, where M's own is X Z^T, and that of b into `grad_b` if it is given, which
    needs a `length` that `fits_one_tile`. Returns the gradient of the shift in float32, if there is one."""
    batch, length, nheads, headdim = x.shape
    options = dot_options(x.dtype)
    rows, cols = tile_of(length, options["DOT"])
    if grad_b is not None:
        rows = cols
    width = min(MAX_HEADDIM_BLOCK, block_of(headdim))
    programs = batch * nheads * triton.cdiv(length, rows)
    grad_shift = None if matrix.shift is None else torch.empty(programs, dtype=torch.float32, device=x.device)
    if programs:
        _gradient_kernel[(programs,)](
            matrix.a, matrix.b, x, z, grad_a, grad_b, grad_shift, matrix.shift, matrix.ids, matrix.starts,
            matrix.row_scales, matrix.col_scales, matrix.constant, matrix.scale, length, nheads, headdim,
            *matrix.a.stride()[:3], *matrix.b.stride()[:3], *x.stride()[:3], *z.stride()[:3],
            *grad_a.stride()[:3], *(grad_a if grad_b is None else grad_b).stride()[:3],
            GRADIENT=gradient, DIMS=matrix.a.shape[-1], DIM_BLOCK=block_of(matrix.a.shape[-1]), ROWS=rows, COLS=cols,
            STEPS=triton.cdiv(length, cols), SKIPS=matrix.skips(cols), WIDTH=width, CHUNKS=triton.cdiv(headdim, width),
            num_warps=8 if rows * cols > 64 * 128 else 4, **options,
        )  # fmt: skip
    return None if grad_shift is None else grad_shift.sum()


def tile_of(length: int, dot: object) -> tuple[int, int]:
    """Rows and columns of a tile for tl.dot operands of a type."""
    if dot == tl.float32:
        rows, cols = FLOAT32_TILE
    else:
        rows, cols = ONE_TILE if length <= ONE_TILE[1] else TILE
    return min(rows, block_of(length)), min(cols, block_of(length))


def fits_one_tile(length: int, dtype: torch.dtype) -> bool:
    """Whether one program sees all rows and columns of M."""
    return length <= tile_of(length, dot_options(dtype)["DOT"])[1]
