"""Triton: one chunk's product Y = M X, M formed on chip, and the gradient of X, which is the same product.

The kernel sees the op from one side. Its *own* tokens are a block of rows of the chunk's matrix, the *other* tokens
all of its columns. For Y the own tokens are the readers (C, row) and the other ones the sources (B, col, x). For the
gradient of X the sides change places: M^T is the same kind of matrix, with the sources reading from dY. All heads of a
group share C . B, which is computed once.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from anymixer_kernels.quasiseparable.triton_log_weights import LogWeights
from anymixer_kernels.triton_common import block_of, dot_options

LOG2_E = tl.constexpr(1.4426950408889634)
# Exponents of pairs that M does not hold are unbounded; this keeps 0 times their weight 0.
MOST_LOG2 = tl.constexpr(60.0)


@dataclass(frozen=True)
class Tiling:
    """rows: own tokens of a program. parts: in how many the other tokens are taken, 1 or 2: halves of the matrix take
    half the registers while a head is worked on. warps, stages: as Triton calls them."""

    rows: int
    parts: int
    warps: int
    stages: int


# Measured on an H100 at chunks of 128, headdim and d_state 64 (benchmarks/results/).
TILING = Tiling(rows=128, parts=2, warps=8, stages=3)


@triton.jit
def load_rows(pointer, at, stride, column, column_ok, length):
    """Rows `at` of a matrix of `length` rows, [rows, columns]; 0 outside it."""
    mask = ((at >= 0) & (at < length))[:, None] & column_ok[None, :]
    return tl.load(pointer + at[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def is_from_left(row, column, READERS: tl.constexpr):
    """Where an own token reads, or is read, from the left: bool [rows, columns], with any value on the diagonal."""
    if READERS:
        return row[:, None] > column[None, :]
    else:
        return row[:, None] < column[None, :]


@triton.jit
def pairs(row, column, own_id, row_ids, begin, length, HAS_IDS: tl.constexpr):
    """Which pairs M holds off its diagonal: two tokens of one sequence."""
    held = row[:, None] != column[None, :]
    if HAS_IDS:
        other_id = tl.load(row_ids + begin + column, mask=begin + column < length, other=-2)
        held = held & (own_id[:, None] == other_id[None, :]) & (own_id >= 0)[:, None]
    return held


@triton.jit
def similarities(
    own_left, own_right, other_f, other_b, row, column, own_id, row_ids, begin, length, proj_token, n, n_ok,
    READERS: tl.constexpr, HAS_IDS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """C . B of each pair that M holds, else 0."""
    # Readers use their neighbour's C: what its state held before they came.
    reach: tl.constexpr = 0 if READERS else 1
    other_left = load_rows(other_f, begin + column - reach, proj_token, n, n_ok, length).to(DOT)
    left = tl.dot(own_left, tl.trans(other_left), input_precision=PRECISION)
    other_right = load_rows(other_b, begin + column + reach, proj_token, n, n_ok, length).to(DOT)
    right = tl.dot(own_right, tl.trans(other_right), input_precision=PRECISION)
    similar = tl.where(is_from_left(row, column, READERS), left, right)
    return tl.where(pairs(row, column, own_id, row_ids, begin, length, HAS_IDS), similar, 0.0)


@triton.jit
def pair_weights(own_log_f, own_log_b, log, direction_size, row, column, READERS: tl.constexpr):
    """exp of the sum of both tokens' logarithms, by the direction of each pair; own_log: in base 2 already."""
    other_log_f = tl.load(log + column) * LOG2_E
    other_log_b = tl.load(log + direction_size + column) * LOG2_E
    exponent = tl.where(
        is_from_left(row, column, READERS),
        own_log_f[:, None] + other_log_f[None, :],
        own_log_b[:, None] + other_log_b[None, :],
    )
    return tl.exp2(tl.minimum(exponent, MOST_LOG2))


@triton.jit
def _mix_columns(
    mixed, similar, own_log_f, own_log_b, log, direction_size, values_at, token_stride, p, p_ok, row, column, begin,
    length, READERS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """mixed, and one head's product with some of the other tokens."""
    weight = pair_weights(own_log_f, own_log_b, log, direction_size, row, column, READERS)
    values = load_rows(values_at, begin + column, token_stride, p, p_ok, length).to(DOT)
    return mixed + tl.dot((similar * weight).to(DOT), values, input_precision=PRECISION)


@triton.jit
def _mix_kernel(
    other, own_f, own_b, other_f, other_b, own_log, other_log, diagonal, ids, extra, extra_rows, out,
    length, rank, nheads, nchunks, headdim, d_state, direction_size,
    other_batch, other_token, other_head, out_batch, out_token, out_head,
    proj_batch, proj_token, proj_group, diag_batch, diag_token,
    HEADS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    READERS: tl.constexpr, ADD: tl.constexpr, HAS_DIAGONAL: tl.constexpr, HAS_IDS: tl.constexpr, RANK: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    batch, chunk = program // nchunks, program % nchunks
    block, group = tl.program_id(1), tl.program_id(2)
    begin = chunk * CHUNK
    row = block * ROWS + tl.arange(0, ROWS)
    token = begin + row
    token_ok = token < length
    n = tl.arange(0, N)
    p = tl.arange(0, P)
    n_ok = n < d_state
    p_ok = p < headdim
    row_ids = ids
    own_id = row
    real = token_ok
    if HAS_IDS:
        row_ids = ids + batch * length
        own_id = tl.load(row_ids + token, mask=token_ok, other=-1)
        real = own_id >= 0
    reach: tl.constexpr = 1 if READERS else 0
    base = batch * proj_batch + group * proj_group
    own_left = load_rows(own_f + base, token - reach, proj_token, n, n_ok, length).to(DOT)
    own_right = load_rows(own_b + base, token + reach, proj_token, n, n_ok, length).to(DOT)
    COLUMNS: tl.constexpr = CHUNK // PARTS
    column = tl.arange(0, COLUMNS)
    second = column + COLUMNS
    similar = similarities(
        own_left, own_right, other_f + base, other_b + base, row, column, own_id, row_ids, begin, length, proj_token,
        n, n_ok, READERS, HAS_IDS, DOT, PRECISION,
    )  # fmt: skip
    if PARTS == 2:
        similar_2 = similarities(
            own_left, own_right, other_f + base, other_b + base, row, second, own_id, row_ids, begin, length,
            proj_token, n, n_ok, READERS, HAS_IDS, DOT, PRECISION,
        )  # fmt: skip
    if RANK > 0:
        r = tl.arange(0, RANK)
        factors = load_rows(extra + batch * length * rank, token, rank, r, r < rank, length).to(DOT)

    for i in range(HEADS):
        head = group * HEADS + i
        logs = (batch * nheads + head) * (nchunks * CHUNK) + begin
        own_log_f = tl.load(own_log + logs + row) * LOG2_E
        own_log_b = tl.load(own_log + direction_size + logs + row) * LOG2_E
        values_at = other + batch * other_batch + head * other_head
        mixed = _mix_columns(
            tl.zeros([ROWS, P], tl.float32), similar, own_log_f, own_log_b, other_log + logs, direction_size, values_at,
            other_token, p, p_ok, row, column, begin, length, READERS, DOT, PRECISION,
        )  # fmt: skip
        if PARTS == 2:
            mixed = _mix_columns(
                mixed, similar_2, own_log_f, own_log_b, other_log + logs, direction_size, values_at,
                other_token, p, p_ok, row, second, begin, length, READERS, DOT, PRECISION,
            )  # fmt: skip
        if HAS_DIAGONAL:
            on_diagonal = tl.load(diagonal + batch * diag_batch + token * diag_token + head, mask=real, other=0.0)
            beside = load_rows(values_at, token, other_token, p, p_ok, length).to(tl.float32)
            mixed += on_diagonal.to(tl.float32)[:, None] * beside
        if RANK > 0:
            basis = load_rows(extra_rows + head * headdim, r, nheads * headdim, p, p_ok, rank).to(DOT)
            mixed += tl.dot(factors, basis, input_precision=PRECISION)
        target = out + batch * out_batch + head * out_head + token[:, None] * out_token + p[None, :]
        written = token_ok[:, None] & p_ok[None, :]
        if ADD:
            mixed += tl.load(target, mask=written, other=0.0).to(tl.float32)
        tl.store(target, mixed, mask=written)


@dataclass(frozen=True)
class Side:
    """One side of the product. values: [batch, length, nheads, headdim], last axis of stride 1, or None where they are
    not read. left, right: [batch, length, ngroups, d_state], C or B; all four projections of a call have the same
    strides, the last 1. log: row or col."""

    values: Tensor | None
    left: Tensor
    right: Tensor
    log: Tensor


def launch_mix(
    own: Side,
    other: Side,
    weights: LogWeights,
    sequence_id: Tensor | None,
    out: Tensor,
    *,
    readers: bool,
    add: bool,
    diagonal: Tensor | None,
    extra: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Write what the own tokens get from the other ones of their chunk into `out`, or add it to what is there.

    readers: the own tokens are the ones that read (Y); else those that are read (dX, of dY). diagonal: [batch, length,
    nheads], last axis of stride 1. extra: [batch, length, rank] and [rank, nheads * headdim], contiguous, whose product
    is added.
    """
    assert other.values is not None
    batch, length, nheads, headdim = other.values.shape
    ngroups, d_state = own.left.shape[2:]
    chunk, rows = weights.chunk, min(TILING.rows, weights.chunk)
    rank = 0 if extra is None else extra[0].shape[-1]
    _mix_kernel[(batch * weights.nchunks, chunk // rows, ngroups)](
        other.values, own.left, own.right, other.left, other.right, own.log, other.log, diagonal, sequence_id,
        *(extra or (None, None)), out,
        length, rank, nheads, weights.nchunks, headdim, d_state, own.log[0].numel(),
        *other.values.stride()[:3], *out.stride()[:3], *own.left.stride()[:3],
        *((0, 0) if diagonal is None else diagonal.stride()[:2]),
        HEADS=nheads // ngroups, CHUNK=chunk, ROWS=rows, PARTS=TILING.parts if chunk >= 64 else 1,
        P=block_of(headdim), N=block_of(d_state), READERS=readers, ADD=add, HAS_DIAGONAL=diagonal is not None,
        HAS_IDS=sequence_id is not None, RANK=block_of(rank) if rank else 0, **dot_options(other.values.dtype),
        num_warps=TILING.warps, num_stages=TILING.stages,
    )  # fmt: skip
