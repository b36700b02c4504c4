"""Triton: the gradients of one chunk's product that go through M's entries: of B, C, the log weights and the diagonal.

As in `triton_mix`, the kernel sees one side: readers for {dC, drow, the diagonal's}, sources for {dB, dcol, its part of
dtotal}. A program holds dM of a block of its own tokens, one head after another, so that the gradient of C . B is
summed over the heads of a group on chip; of the totals alone, parts are left to be summed. Two programs of 4 warps
share a multiprocessor: one computes while the other waits.
"""

from dataclasses import dataclass

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
    is_from_left,
    load_far_projection,
    load_projection,
    load_rows,
    load_state,
    near_pairs,
    near_weights,
    of_one_sequence,
    place_of_program,
    similarities,
)
from anymixer_kernels.triton_common import block_of, dot_options

# Chosen offline, by registers and instructions; `benchmarks/hydra_kernels.py --tune` tries others.
TILING = Tiling(rows=64, warps=4, stages=3)


@triton.jit
def _gradients_kernel(
    own, other, own_f, own_b, other_f, other_b, own_log, other_log, ids, states, total,
    grad_own_f, grad_own_b, grad_own_log, grad_total, grad_diagonal,
    length, nheads, nchunks, total_size, total_width, state_size, own_batch, other_batch, proj_batch, grad_batch,
    headdim: tl.constexpr, d_state: tl.constexpr, own_token: tl.constexpr, own_head: tl.constexpr,
    other_token: tl.constexpr, other_head: tl.constexpr, proj_token: tl.constexpr, proj_group: tl.constexpr,
    grad_token: tl.constexpr, grad_group: tl.constexpr,
    HEADS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    READERS: tl.constexpr, HAS_DIAGONAL: tl.constexpr, HAS_IDS: tl.constexpr, CROSS: tl.constexpr,
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
    reach: tl.constexpr = 1 if READERS else 0
    other_reach: tl.constexpr = 1 - reach
    base = batch * proj_batch + begin * proj_token + group * proj_group
    far_from_left = is_far_from_left(block, READERS)
    own_left, own_right, similar, far_similar = similarities(
        own_f + base, own_b + base, other_f + base, other_b + base, ids, batch, begin, length, row, far, inside, n,
        d_state, proj_token, far_from_left, READERS, FAR, HAS_IDS, DOT, PRECISION,
    )  # fmt: skip
    grad_similar = tl.zeros([ROWS, ROWS], tl.float32)
    if FAR:
        grad_far = tl.zeros([ROWS, ROWS], tl.float32)

    own_at = own + batch * own_batch + begin * own_token
    other_at = other + batch * other_batch + begin * other_token
    first_log = ((batch * nchunks + begin // CHUNK) * nheads + group * HEADS) * (2 * CHUNK)
    for i in range(HEADS):
        head = group * HEADS + i
        logs = first_log + i * (2 * CHUNK)
        own_log_f = tl.load(own_log + logs + row)
        own_log_b = tl.load(own_log + CHUNK + logs + row)
        mine = load_rows(own_at + head * own_head, row, own_token, p, headdim, begin, length, WHOLE).to(DOT)
        values_at = other_at + head * other_head
        if FAR:
            values = load_rows(values_at, far, other_token, p, headdim, begin, length, WHOLE).to(DOT)
            own_factor, other_factor = far_factors(
                own_log_f, own_log_b, own_log + logs, other_log + logs, far, far_from_left, CHUNK, ROWS, READERS
            )
            weighted = tl.dot(mine, tl.trans(values), input_precision=PRECISION) * other_factor[None, :]
            grad_far += weighted * own_factor[:, None]
            of_far = tl.sum(weighted * far_similar, axis=1) * own_factor
        values = load_rows(values_at, row, other_token, p, headdim, begin, length, WHOLE).to(DOT)
        product = tl.dot(mine, tl.trans(values), input_precision=PRECISION)
        weight = near_weights(own_log_f, own_log_b, other_log + logs, row, inside, CHUNK, READERS)
        weighted = product * weight
        grad_similar += weighted
        from_left = is_from_left(inside, READERS)
        of_left = tl.sum(tl.where(from_left, weighted, 0.0) * similar, axis=1)
        of_right = tl.sum(tl.where(from_left, 0.0, weighted) * similar, axis=1)
        if FAR:
            of_left += tl.where(far_from_left, of_far, 0.0)
            of_right += tl.where(far_from_left, 0.0, of_far)
        tl.store(grad_own_log + logs + row, of_left)
        tl.store(grad_own_log + CHUNK + logs + row, of_right)
        if HAS_DIAGONAL:
            on_diagonal = tl.sum(tl.where(inside[:, None] == inside[None, :], product, 0.0), axis=1)
            on_diagonal = tl.where(own_id >= 0, on_diagonal, 0.0)
            at = (batch * length + begin + row) * nheads + head
            tl.store(grad_diagonal + at, on_diagonal, mask=begin + row < length)

    grad_similar = tl.where(near_pairs(own_id, inside, HAS_IDS), grad_similar, 0.0)
    from_left = is_from_left(inside, READERS)
    # Read again rather than held through the loop.
    left = load_projection(other_f + base, row, proj_token, n, d_state, begin, length, -other_reach, DOT)
    right = load_projection(other_b + base, row, proj_token, n, d_state, begin, length, other_reach, DOT)
    grad_left = tl.dot(tl.where(from_left, grad_similar, 0.0).to(DOT), left, input_precision=PRECISION)
    grad_right = tl.dot(tl.where(from_left, 0.0, grad_similar).to(DOT), right, input_precision=PRECISION)
    if FAR:
        if HAS_IDS:
            far_id = ids_of(ids, batch, begin + far, length, -2, HAS_IDS)
            grad_far = tl.where(of_one_sequence(own_id, far_id), grad_far, 0.0)
        others = load_far_projection(
            other_f + base, other_b + base, far, far_from_left, proj_token, n, d_state, begin, length, READERS, DOT
        )
        of_far = tl.dot(grad_far.to(DOT), others, input_precision=PRECISION)
        grad_left += tl.where(far_from_left, of_far, 0.0)
        grad_right += tl.where(far_from_left, 0.0, of_far)
    if CROSS:
        crosses_left, crosses_right = crossing(ids, batch, own_id, begin, length, CHUNK, READERS, HAS_IDS)
        own_left = load_projection(own_f + base, row, proj_token, n, d_state, begin, length, -reach, DOT).to(tl.float32)
        own_right = load_projection(own_b + base, row, proj_token, n, d_state, begin, length, reach, DOT).to(tl.float32)
        tl.debug_barrier()  # the gradients of the log weights, written above, are added to
        for i in range(HEADS):
            head = group * HEADS + i
            logs = first_log + i * (2 * CHUNK)
            chunk_at = (batch * nheads + head) * nchunks + begin // CHUNK
            cross_f, cross_b = crossing_weights(
                own_log + logs, total + chunk_at, crosses_left, crosses_right, row, total_size, CHUNK, READERS
            )
            mine = load_rows(own_at + head * own_head, row, own_token, p, headdim, begin, length, WHOLE).to(DOT)
            state_at = states + (first_log // (2 * CHUNK) + i) * (headdim * d_state)
            state = load_state(state_at, p, n, headdim, d_state, DOT)
            met = tl.dot(mine, state, input_precision=PRECISION)
            grad_left += met * cross_f[:, None]
            of_left = tl.sum(met * own_left, axis=1) * cross_f
            state = load_state(state_at + state_size, p, n, headdim, d_state, DOT)
            met = tl.dot(mine, state, input_precision=PRECISION)
            grad_right += met * cross_b[:, None]
            of_right = tl.sum(met * own_right, axis=1) * cross_b
            log_at = grad_own_log + logs + row
            tl.store(log_at, tl.load(log_at) + of_left)
            tl.store(log_at + CHUNK, tl.load(log_at + CHUNK) + of_right)
            if not READERS:  # what leaves the chunk from a source has the rest of the chunk's decay
                total_at = grad_total + chunk_at * total_width + block
                tl.store(total_at, tl.sum(of_left, axis=0))
                tl.store(total_at + total_size * total_width, tl.sum(of_right, axis=0))
    token = begin + row
    left_at = token
    right_at = token
    if READERS:
        # Nobody reads the last token's C (the first one's, from the right): the row without a neighbour, whose
        # gradient is zero, writes it.
        left_at = tl.where(token == 0, length - 1, token - 1)
        right_at = tl.where(token == length - 1, 0, token + 1)
    base = batch * grad_batch + group * grad_group
    stored = (token < length)[:, None] & (n < d_state)[None, :]
    tl.store(grad_own_f + base + left_at[:, None] * grad_token + n[None, :], grad_left, mask=stored)
    tl.store(grad_own_b + base + right_at[:, None] * grad_token + n[None, :], grad_right, mask=stored)


@dataclass(frozen=True)
class Gradients:
    """Where a side's gradients go: left, right like the projections (with the same strides as each other); log like row
    and col; total, of the sources alone and None where a row is one chunk: of the chunks' totals, [2, batch, nheads,
    nchunks, blocks], to be summed over the last axis, of stride 1."""

    left: Tensor
    right: Tensor
    log: Tensor
    total: Tensor | None = None


def blocks_of_chunk(chunk: int) -> int:
    """Programs that share a chunk's gradients: the last axis of `Gradients.total`."""
    return chunk // TILING.rows_of(chunk)


def launch_gradients(
    own: Side,
    other: Side,
    weights: LogWeights,
    sequence_id: Tensor | None,
    grads: Gradients,
    *,
    readers: bool,
    grad_diagonal: Tensor | None = None,
    states: Tensor | None = None,
) -> None:
    """Write the gradients of the own side; the readers' values are dY. grad_diagonal: float32 [batch, length, nheads],
    of the readers alone. states: what the own tokens meet of other chunks, contiguous."""
    assert own.values is not None and other.values is not None
    batch, length, nheads, headdim = own.values.shape
    ngroups, d_state = own.left.shape[2:]
    rows = TILING.rows_of(weights.chunk)
    _gradients_kernel[(batch * weights.nchunks * blocks_of_chunk(weights.chunk), ngroups)](
        own.values, other.values, own.left, own.right, other.left, other.right, own.log, other.log, sequence_id,
        states, weights.total, grads.left, grads.right, grads.log, grads.total, grad_diagonal,
        length, nheads, weights.nchunks, weights.total[0].numel(), 0 if grads.total is None else grads.total.stride(3),
        0 if states is None else states[0].numel(),
        *(t.stride(0) for t in (own.values, other.values, own.left, grads.left)),
        headdim, d_state, *(t.stride(i) for t in (own.values, other.values, own.left, grads.left) for i in (1, 2)),
        HEADS=nheads // ngroups, CHUNK=weights.chunk, ROWS=rows, P=block_of(headdim), N=block_of(d_state),
        READERS=readers, HAS_DIAGONAL=grad_diagonal is not None, HAS_IDS=sequence_id is not None,
        CROSS=states is not None, WHOLE=length % weights.chunk == 0, **dot_options(own.values.dtype),
        **TILING.options(3 * rows * headdim * own.values.itemsize),
    )  # fmt: skip
