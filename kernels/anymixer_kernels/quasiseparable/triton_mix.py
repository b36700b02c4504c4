"""Triton: one chunk's product Y = M X, M formed on chip, and the gradient of X, which is the same product.

The kernel sees the op from one side. For Y the own tokens are the readers (C, row) and the other ones the sources (B,
col, x). For the gradient of X the sides change places: M^T is the same kind of matrix, with the sources reading from
dY. All heads of a group share C . B, which is computed once.
"""

import triton
import triton.language as tl
from torch import Tensor

from anymixer_kernels.quasiseparable.triton_log_weights import LogWeights
from anymixer_kernels.quasiseparable.triton_tiles import (
    Side,
    Tiling,
    crossing,
    crossing_weights,
    far_factors,
    ids_of,
    is_far_from_left,
    load_rows,
    load_state,
    near_weights,
    place_of_program,
    similarities,
)
from anymixer_kernels.triton_common import block_of, dot_options

# Chosen offline, by registers and instructions; `benchmarks/hydra_kernels.py --tune` tries others.
TILING = Tiling(rows=64, warps=4, stages=3)


@triton.jit
def _mix_kernel(
    other, own_f, own_b, other_f, other_b, own_log, other_log, diagonal, ids, extra, extra_rows, states, total, out,
    length, nheads, nchunks, total_size, state_size, other_batch, out_batch, proj_batch, diag_batch,
    headdim: tl.constexpr, d_state: tl.constexpr, rank: tl.constexpr,
    other_token: tl.constexpr, other_head: tl.constexpr, out_token: tl.constexpr, out_head: tl.constexpr,
    proj_token: tl.constexpr, proj_group: tl.constexpr, diag_token: tl.constexpr,
    HEADS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    READERS: tl.constexpr, CROSS: tl.constexpr, HAS_DIAGONAL: tl.constexpr, HAS_IDS: tl.constexpr, RANK: tl.constexpr,
    WHOLE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    FAR: tl.constexpr = CHUNK > ROWS
    batch, begin, block = place_of_program(nchunks, CHUNK, ROWS)
    group = tl.program_id(1)
    inside = tl.arange(0, ROWS)
    row = block * ROWS + inside
    far = (1 - block) * ROWS + inside
    n = tl.arange(0, N)
    p = tl.arange(0, P)
    own_id = ids_of(ids, batch, begin + row, length, -1, HAS_IDS)
    base = batch * proj_batch + begin * proj_token + group * proj_group
    far_from_left = is_far_from_left(block, READERS)
    own_left, own_right, similar, far_similar = similarities(
        own_f + base, own_b + base, other_f + base, other_b + base, ids, batch, begin, length, row, far, inside, n,
        d_state, proj_token, far_from_left, READERS, FAR, HAS_IDS, DOT, PRECISION,
    )  # fmt: skip
    if RANK > 0:
        r = tl.arange(0, RANK)
        factors_at = extra + (batch * length + begin) * rank
        factors = load_rows(factors_at, row, rank, r, rank, begin, length, WHOLE).to(DOT)

    if CROSS:
        crosses_left, crosses_right = crossing(ids, batch, own_id, begin, length, CHUNK, READERS, HAS_IDS)

    other_at = other + batch * other_batch + begin * other_token
    out_at = out + batch * out_batch + begin * out_token
    if HAS_DIAGONAL:
        diagonal_at = diagonal + batch * diag_batch + begin * diag_token
    first_log = ((batch * nchunks + begin // CHUNK) * nheads + group * HEADS) * (2 * CHUNK)
    for i in range(HEADS):
        head = group * HEADS + i
        logs = first_log + i * (2 * CHUNK)
        own_log_f = tl.load(own_log + logs + row)
        own_log_b = tl.load(own_log + CHUNK + logs + row)
        mixed = tl.zeros([ROWS, P], tl.float32)
        if CROSS:
            state_at = states + (first_log // (2 * CHUNK) + i) * (headdim * d_state)
            total_at = total + (batch * nheads + head) * nchunks + begin // CHUNK
            cross_f, cross_b = crossing_weights(
                own_log + logs, total_at, crosses_left, crosses_right, row, total_size, CHUNK, READERS
            )
            state = load_state(state_at, p, n, headdim, d_state, DOT)
            mixed = tl.dot(own_left, tl.trans(state), input_precision=PRECISION) * cross_f[:, None]
            state = load_state(state_at + state_size, p, n, headdim, d_state, DOT)
            mixed += tl.dot(own_right, tl.trans(state), input_precision=PRECISION) * cross_b[:, None]
        entries = similar * near_weights(own_log_f, own_log_b, other_log + logs, row, inside, CHUNK, READERS)
        if HAS_DIAGONAL:
            on_diagonal = tl.load(diagonal_at + row * diag_token + head, mask=own_id >= 0, other=0.0).to(tl.float32)
            entries = tl.where(inside[:, None] == inside[None, :], on_diagonal[:, None], entries)
        values_at = other_at + head * other_head
        values = load_rows(values_at, row, other_token, p, headdim, begin, length, WHOLE).to(DOT)
        mixed = tl.dot(entries.to(DOT), values, mixed, input_precision=PRECISION)
        if FAR:
            own_factor, other_factor = far_factors(
                own_log_f, own_log_b, own_log + logs, other_log + logs, far, far_from_left, CHUNK, ROWS, READERS
            )
            entries = far_similar * other_factor[None, :] * own_factor[:, None]
            values = load_rows(values_at, far, other_token, p, headdim, begin, length, WHOLE).to(DOT)
            mixed = tl.dot(entries.to(DOT), values, mixed, input_precision=PRECISION)
        if RANK > 0:
            basis_at = extra_rows + head * headdim + r[:, None] * (nheads * headdim) + p[None, :]
            basis = tl.load(basis_at, mask=(r < rank)[:, None] & (p < headdim)[None, :], other=0.0).to(DOT)
            mixed = tl.dot(factors, basis, mixed, input_precision=PRECISION)
        target = out_at + head * out_head + row[:, None] * out_token + p[None, :]
        written = (begin + row < length)[:, None] & (p < headdim)[None, :]
        if WHOLE:
            written = (inside >= 0)[:, None] & (p < headdim)[None, :]
        tl.store(target, mixed, mask=written)


def launch_mix(
    own: Side,
    other: Side,
    weights: LogWeights,
    sequence_id: Tensor | None,
    out: Tensor,
    *,
    readers: bool,
    diagonal: Tensor | None,
    extra: tuple[Tensor, Tensor] | None = None,
    states: Tensor | None = None,
) -> None:
    """Write what the own tokens get into `out`: from the other ones of their chunk and, by `states`, from other chunks.

    readers: the own tokens are the ones that read (Y); else those that are read (dX, of dY). diagonal: [batch, length,
    nheads], last axis of stride 1. extra: [batch, length, rank] and [rank, nheads * headdim], contiguous, whose product
    is added. states: what the own tokens meet, [2, batch, nchunks, nheads, headdim, d_state], contiguous.
    """
    assert other.values is not None
    batch, length, nheads, headdim = other.values.shape
    ngroups, d_state = own.left.shape[2:]
    rows = TILING.rows_of(weights.chunk)
    strided = out if diagonal is None else diagonal
    loaded = (weights.chunk + (0 if states is None else 2 * d_state)) * headdim
    rank = 0 if extra is None else extra[0].shape[-1]
    _mix_kernel[(batch * weights.nchunks * (weights.chunk // rows), ngroups)](
        other.values, own.left, own.right, other.left, other.right, own.log, other.log, diagonal, sequence_id,
        *(extra or (None, None)), states, weights.total, out,
        length, nheads, weights.nchunks, weights.total[0].numel(), 0 if states is None else states[0].numel(),
        *(t.stride(0) for t in (other.values, out, own.left, strided)),
        headdim, d_state, rank, *(t.stride(i) for t in (other.values, out, own.left) for i in (1, 2)),
        strided.stride(1),
        HEADS=nheads // ngroups, CHUNK=weights.chunk, ROWS=rows, P=block_of(headdim), N=block_of(d_state),
        READERS=readers, CROSS=states is not None, HAS_DIAGONAL=diagonal is not None, HAS_IDS=sequence_id is not None,
        RANK=block_of(rank) if rank else 0, WHOLE=length % weights.chunk == 0, **dot_options(other.values.dtype),
        **TILING.options(loaded * other.values.itemsize),
    )  # fmt: skip
