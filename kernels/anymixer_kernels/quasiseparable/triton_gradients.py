"""Triton: the gradients of one chunk's product that go through M's entries: of B, C, the log weights and the diagonal.

As in `triton_mix`, the kernel sees one side: readers for {dC, drow, the diagonal's}, sources for {dB, dcol}. A program
holds dM of a block of its own tokens, one head after another, so that the gradient of C . B is summed over the heads of
a group on chip, and nothing is summed across programs. One program for both sides, with all of a chunk's dM, spills
registers and takes longer than the two.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from anymixer_kernels.quasiseparable.triton_log_weights import LogWeights
from anymixer_kernels.quasiseparable.triton_mix import (
    LOG2_E,
    Side,
    is_from_left,
    load_rows,
    pair_weights,
    pairs,
    similarities,
)
from anymixer_kernels.triton_common import block_of, dot_options

# Own tokens of a program, its warps and stages; measured on an H100 at chunks of 128, headdim and d_state 64.
ROWS, WARPS, STAGES = 64, 8, 3


@triton.jit
def _gradients_kernel(
    own, other, own_f, own_b, other_f, other_b, own_log, other_log, ids,
    grad_own_f, grad_own_b, grad_own_log, grad_diagonal,
    length, nheads, nchunks, headdim, d_state, direction_size,
    own_batch, own_token, own_head, other_batch, other_token, other_head,
    proj_batch, proj_token, proj_group, grad_batch, grad_token, grad_group,
    HEADS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    READERS: tl.constexpr, HAS_DIAGONAL: tl.constexpr, HAS_IDS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    batch, chunk = program // nchunks, program % nchunks
    block, group = tl.program_id(1), tl.program_id(2)
    begin = chunk * CHUNK
    row = block * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, CHUNK)
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
    own_reach: tl.constexpr = 1 if READERS else 0
    other_reach: tl.constexpr = 0 if READERS else 1
    base = batch * proj_batch + group * proj_group
    own_left = load_rows(own_f + base, token - own_reach, proj_token, n, n_ok, length).to(DOT)
    own_right = load_rows(own_b + base, token + own_reach, proj_token, n, n_ok, length).to(DOT)
    similar = similarities(
        own_left, own_right, other_f + base, other_b + base, row, column, own_id, row_ids, begin, length, proj_token,
        n, n_ok, READERS, HAS_IDS, DOT, PRECISION,
    )  # fmt: skip
    grad_similar = tl.zeros([ROWS, CHUNK], tl.float32)
    for i in range(HEADS):
        head = group * HEADS + i
        logs = (batch * nheads + head) * (nchunks * CHUNK) + begin
        own_log_f = tl.load(own_log + logs + row) * LOG2_E
        own_log_b = tl.load(own_log + direction_size + logs + row) * LOG2_E
        weight = pair_weights(own_log_f, own_log_b, other_log + logs, direction_size, row, column, READERS)
        values_at = other + batch * other_batch + head * other_head
        values = load_rows(values_at, begin + column, other_token, p, p_ok, length).to(DOT)
        mine = load_rows(own + batch * own_batch + head * own_head, token, own_token, p, p_ok, length)
        weighted = tl.dot(mine.to(DOT), tl.trans(values), input_precision=PRECISION) * weight
        grad_similar += weighted
        of_log = weighted * similar
        from_left = is_from_left(row, column, READERS)
        tl.store(grad_own_log + logs + row, tl.sum(tl.where(from_left, of_log, 0.0), axis=1))
        tl.store(grad_own_log + direction_size + logs + row, tl.sum(tl.where(from_left, 0.0, of_log), axis=1))
        if HAS_DIAGONAL:
            beside = load_rows(values_at, token, other_token, p, p_ok, length).to(tl.float32)
            on_diagonal = tl.where(real, tl.sum(beside * mine.to(tl.float32), axis=1), 0.0)
            tl.store(grad_diagonal + (batch * length + token) * nheads + head, on_diagonal, mask=token_ok)

    grad_similar = tl.where(pairs(row, column, own_id, row_ids, begin, length, HAS_IDS), grad_similar, 0.0)
    from_left = is_from_left(row, column, READERS)
    # Read again rather than held through the loop.
    other_left = load_rows(other_f + base, begin + column - other_reach, proj_token, n, n_ok, length).to(DOT)
    grad_left = tl.dot(tl.where(from_left, grad_similar, 0.0).to(DOT), other_left, input_precision=PRECISION)
    other_right = load_rows(other_b + base, begin + column + other_reach, proj_token, n, n_ok, length).to(DOT)
    grad_right = tl.dot(tl.where(from_left, 0.0, grad_similar).to(DOT), other_right, input_precision=PRECISION)
    left_at = token
    right_at = token
    if READERS:
        # Nobody reads the last token's C (the first one's, from the right): the row without a neighbour, whose
        # gradient is zero, writes it.
        left_at = tl.where(token == 0, length - 1, token - 1)
        right_at = tl.where(token == length - 1, 0, token + 1)
    base = batch * grad_batch + group * grad_group
    stored = token_ok[:, None] & n_ok[None, :]
    tl.store(grad_own_f + base + left_at[:, None] * grad_token + n[None, :], grad_left, mask=stored)
    tl.store(grad_own_b + base + right_at[:, None] * grad_token + n[None, :], grad_right, mask=stored)


@dataclass(frozen=True)
class Gradients:
    """Where a side's gradients go: left, right like the projections (with the same strides as each other), log like row
    and col."""

    left: Tensor
    right: Tensor
    log: Tensor


def launch_gradients(
    own: Side,
    other: Side,
    weights: LogWeights,
    sequence_id: Tensor | None,
    grads: Gradients,
    *,
    readers: bool,
    grad_diagonal: Tensor | None = None,
) -> None:
    """Write the gradients of the own side; the readers' values are dY. grad_diagonal: float32 [batch, length, nheads],
    of the readers alone."""
    assert own.values is not None and other.values is not None
    batch, length, nheads, headdim = own.values.shape
    ngroups, d_state = own.left.shape[2:]
    rows = min(ROWS, weights.chunk)
    _gradients_kernel[(batch * weights.nchunks, weights.chunk // rows, ngroups)](
        own.values, other.values, own.left, own.right, other.left, other.right, own.log, other.log, sequence_id,
        grads.left, grads.right, grads.log, grad_diagonal,
        length, nheads, weights.nchunks, headdim, d_state, own.log[0].numel(),
        *own.values.stride()[:3], *other.values.stride()[:3], *own.left.stride()[:3], *grads.left.stride()[:3],
        HEADS=nheads // ngroups, CHUNK=weights.chunk, ROWS=rows, P=block_of(headdim), N=block_of(d_state),
        READERS=readers, HAS_DIAGONAL=grad_diagonal is not None, HAS_IDS=sequence_id is not None,
        **dot_options(own.values.dtype), num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
