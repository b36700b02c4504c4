"""Triton: step sizes to the logarithms of what readers and sources contribute inside a chunk, and back.

With a[t] = A dt[t] log2(e) and sums over the tokens of a chunk,

    forward:   row[t] = sum_{r<t} a[r],   col[s] = log2 dt[s] - sum_{r<=s} a[r],   total = sum_r a[r]
    backward:  row[t] = sum_{r>t} a[r],   col[s] = log2 dt[s] - sum_{r>=s} a[r],   total = sum_r a[r]

so that source s weighs 2^(row[t] + col[s]) at reader t. Padding has a = 0 and no weight. In base 2 a kernel adds two
logarithms and takes their power: were they scaled first, a compiler could round the pair (t, s) in one way where t is
the own token and in another where s is, and those differences do not cancel in the gradients of A and dt.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

# e^-80 of an input is as good as nothing, and a step that underflowed to 0 must not become log 0.
LEAST_STEP = 1e-35
LOG2_E = tl.constexpr(1.4426950408889634)
HEADS_AT_ONCE = 8


@dataclass(frozen=True)
class LogWeights:
    """In base 2; direction 0 reads from the left. row, col: float32 [batch, nchunks, nheads, 2, chunk]: what a chunk's
    program reads stands in one piece. total: float32 [2, batch, nheads, nchunks]."""

    row: Tensor
    col: Tensor
    total: Tensor
    chunk: int

    @property
    def nchunks(self) -> int:
        """Chunks in a row."""
        return self.total.shape[-1]


@dataclass(frozen=True)
class Steps:
    """What step sizes are made of.

    forward, backward: [batch, length, nheads], the same strides, last axis 1: step sizes or, with a bias, softplus'
    argument before it is added. A, bias: float32 [nheads]. sequence_id: [batch, length] or None.
    """

    forward: Tensor
    backward: Tensor
    A: Tensor
    bias: Tensor | None
    sequence_id: Tensor | None


@triton.jit
def _step_size(raw, bias, SOFTPLUS: tl.constexpr):
    """(argument, step size)"""
    argument = raw.to(tl.float32)
    if SOFTPLUS:
        argument = argument + bias
        # log(1 + u) to float32's last digit however small u is; beyond 20, as in torch, the argument itself.
        u = tl.exp(tl.minimum(argument, 20.0))
        w = 1.0 + u
        exact = tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))
        step = tl.where(argument > 20.0, argument, exact)
    else:
        step = argument
    return argument, step


@triton.jit
def _log_weights_kernel(
    dt_f, dt_b, A, bias, ids, row, col, total,
    length, nheads, nchunks, dt_batch, dt_token, total_size,
    CHUNK: tl.constexpr, HEADS: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_IDS: tl.constexpr,
    LEAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    batch, chunk = program // nchunks, program % nchunks
    inside = tl.arange(0, CHUNK)
    token = chunk * CHUNK + inside
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    head_ok = head < nheads
    real = token < length
    if HAS_IDS:
        real = real & (tl.load(ids + batch * length + token, mask=real, other=-1) >= 0)
    ok = real[:, None] & head_ok[None, :]
    decay = tl.load(A + head, mask=head_ok, other=0.0)[None, :]
    shift = tl.zeros([1, HEADS], tl.float32)
    if SOFTPLUS:
        shift = tl.load(bias + head, mask=head_ok, other=0.0)[None, :]
    place = batch * dt_batch + token[:, None] * dt_token + head[None, :]
    target = (program * nheads + head[None, :]) * (2 * CHUNK)
    chunk_target = (batch * nheads + head) * nchunks + chunk
    stored = head_ok[None, :] & (inside[:, None] >= 0)

    argument, step = _step_size(tl.load(dt_f + place, mask=ok, other=0.0), shift, SOFTPLUS)
    log_step = tl.log2(tl.maximum(tl.where(ok, step, 0.0), LEAST))
    a = tl.where(ok, decay * LOG2_E * step, 0.0)
    running = tl.cumsum(a, axis=0)
    last = inside[:, None] == CHUNK - 1
    # Row t+1 is the very sum of column t, so that neighbours weigh exactly dt however large the sums are.
    tl.store(row + target + tl.where(last, 0, inside[:, None] + 1), tl.where(last, 0.0, running), mask=stored)
    tl.store(col + target + inside[:, None], log_step - running, mask=stored)
    tl.store(total + chunk_target, tl.sum(a, axis=0), mask=head_ok)

    argument, step = _step_size(tl.load(dt_b + place, mask=ok, other=0.0), shift, SOFTPLUS)
    log_step = tl.log2(tl.maximum(tl.where(ok, step, 0.0), LEAST))
    a = tl.where(ok, decay * LOG2_E * step, 0.0)
    running = tl.cumsum(a, axis=0, reverse=True)
    first = inside[:, None] == 0
    target += CHUNK
    tl.store(row + target + tl.where(first, CHUNK - 1, inside[:, None] - 1), tl.where(first, 0.0, running), mask=stored)
    tl.store(col + target + inside[:, None], log_step - running, mask=stored)
    tl.store(total + total_size + chunk_target, tl.sum(a, axis=0), mask=head_ok)


@triton.jit
def _log_weights_backward_kernel(
    dt_f, dt_b, A, bias, ids, grad_row, grad_col, grad_total,
    grad_dt_f, grad_dt_b, grad_A, grad_bias,
    length, nheads, nchunks, dt_batch, dt_token, grad_dt_batch, grad_dt_token, total_size,
    CHUNK: tl.constexpr, HEADS: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_IDS: tl.constexpr,
    CROSS: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    batch, chunk = program // nchunks, program % nchunks
    inside = tl.arange(0, CHUNK)
    token = chunk * CHUNK + inside
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    head_ok = head < nheads
    in_row = token < length
    real = in_row
    if HAS_IDS:
        real = real & (tl.load(ids + batch * length + token, mask=real, other=-1) >= 0)
    ok = real[:, None] & head_ok[None, :]
    stored = in_row[:, None] & head_ok[None, :]
    decay = tl.load(A + head, mask=head_ok, other=0.0)[None, :]
    shift = tl.zeros([1, HEADS], tl.float32)
    if SOFTPLUS:
        shift = tl.load(bias + head, mask=head_ok, other=0.0)[None, :]
    place = batch * dt_batch + token[:, None] * dt_token + head[None, :]
    grad_place = batch * grad_dt_batch + token[:, None] * grad_dt_token + head[None, :]
    source = (program * nheads + head[None, :]) * (2 * CHUNK) + inside[:, None]
    chunk_source = (batch * nheads + head) * nchunks + chunk

    by_row = tl.load(grad_row + source, mask=ok, other=0.0)
    by_col = tl.load(grad_col + source, mask=ok, other=0.0)
    of_total = tl.zeros([HEADS], tl.float32)
    if CROSS:
        of_total += tl.load(grad_total + chunk_source, mask=head_ok, other=0.0)
    argument, step = _step_size(tl.load(dt_f + place, mask=ok, other=0.0), shift, SOFTPLUS)
    da = tl.cumsum(by_row - by_col, axis=0, reverse=True) - by_row + of_total[None, :]
    step = tl.where(ok, step, 0.0)
    da = tl.where(ok, da, 0.0)
    of_A = tl.sum(da * step, axis=0)
    grad = decay * da + tl.where(step > LEAST, by_col / tl.maximum(step, LEAST), 0.0)
    if SOFTPLUS:
        grad = tl.where(ok, grad * tl.sigmoid(argument), 0.0)
    of_bias = tl.sum(grad, axis=0)
    tl.store(grad_dt_f + grad_place, grad, mask=stored)

    by_row = tl.load(grad_row + CHUNK + source, mask=ok, other=0.0)
    by_col = tl.load(grad_col + CHUNK + source, mask=ok, other=0.0)
    of_total = tl.zeros([HEADS], tl.float32)
    if CROSS:
        of_total += tl.load(grad_total + total_size + chunk_source, mask=head_ok, other=0.0)
    argument, step = _step_size(tl.load(dt_b + place, mask=ok, other=0.0), shift, SOFTPLUS)
    da = tl.cumsum(by_row - by_col, axis=0) - by_row + of_total[None, :]
    step = tl.where(ok, step, 0.0)
    da = tl.where(ok, da, 0.0)
    of_A += tl.sum(da * step, axis=0)
    grad = decay * da + tl.where(step > LEAST, by_col / tl.maximum(step, LEAST), 0.0)
    if SOFTPLUS:
        grad = tl.where(ok, grad * tl.sigmoid(argument), 0.0)
    of_bias += tl.sum(grad, axis=0)
    tl.store(grad_dt_b + grad_place, grad, mask=stored)

    tl.store(grad_A + program * nheads + head, of_A, mask=head_ok)
    tl.store(grad_bias + program * nheads + head, of_bias, mask=head_ok)


def log_weights(steps: Steps, chunk: int) -> LogWeights:
    """The logarithms for chunks of `chunk` tokens."""
    batch, length, nheads = steps.forward.shape
    nchunks = triton.cdiv(length, chunk)
    row, col = steps.A.new_empty(2, batch, nchunks, nheads, 2, chunk)
    total = steps.A.new_empty(2, batch, nheads, nchunks)
    _log_weights_kernel[(batch * nchunks, triton.cdiv(nheads, HEADS_AT_ONCE))](
        steps.forward, steps.backward, steps.A, steps.bias, steps.sequence_id, row, col, total,
        length, nheads, nchunks, *steps.forward.stride()[:2], total[0].numel(),
        CHUNK=chunk, HEADS=HEADS_AT_ONCE, SOFTPLUS=steps.bias is not None, HAS_IDS=steps.sequence_id is not None,
        LEAST=LEAST_STEP, num_warps=4,
    )  # fmt: skip
    return LogWeights(row, col, total, chunk)


def log_weights_backward(
    steps: Steps,
    weights: LogWeights,
    grad_logs: tuple[Tensor, Tensor],
    grad_total: Tensor | None,
    grad_steps: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Write the gradients of `steps.forward` and `steps.backward` into `grad_steps` (the same strides as each other,
    the last 1); return those of A and of the bias: float32 [nheads].

    grad_logs: of row and col as natural logarithms; grad_total: of total, None where a row is one chunk.
    """
    batch, length, nheads = steps.forward.shape
    nchunks = weights.nchunks
    grad_A, grad_bias = steps.A.new_empty(2, batch * nchunks, nheads)
    _log_weights_backward_kernel[(batch * nchunks, triton.cdiv(nheads, HEADS_AT_ONCE))](
        steps.forward, steps.backward, steps.A, steps.bias, steps.sequence_id, *grad_logs,
        grad_total, *grad_steps, grad_A, grad_bias,
        length, nheads, nchunks, *steps.forward.stride()[:2], *grad_steps[0].stride()[:2], weights.total[0].numel(),
        CHUNK=weights.chunk, HEADS=HEADS_AT_ONCE, SOFTPLUS=steps.bias is not None,
        HAS_IDS=steps.sequence_id is not None, CROSS=grad_total is not None, LEAST=LEAST_STEP, num_warps=8,
    )  # fmt: skip
    return grad_A.sum(0), grad_bias.sum(0)
