"""Triton: the states that chunks leave, their journey from chunk to chunk, and what tokens meet of them, in both
directions at once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from anymixer_kernels.quasiseparable.triton_gradients import Gradients
from anymixer_kernels.quasiseparable.triton_log_weights import LogWeights
from anymixer_kernels.quasiseparable.triton_mix import LOG2_E, MOST_LOG2, Side, load_rows
from anymixer_kernels.triton_common import block_of, dot_options

ENTRIES_AT_ONCE = 512
# Own tokens of a program of the crossing kernel, its warps and stages.
CROSS_ROWS, CROSS_WARPS, CROSS_STAGES = 128, 8, 2


@triton.jit
def _gather_kernel(
    values, left, right, log, total, ids, out,
    length, nheads, nchunks, headdim, d_state, heads_per_group, direction_size, total_size, state_size,
    value_batch, value_token, value_head, proj_batch, proj_token, proj_group,
    CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr, READERS: tl.constexpr, HAS_IDS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    batch, chunk = program // nchunks, program % nchunks
    head = tl.program_id(1)
    begin = chunk * CHUNK
    inside = tl.arange(0, CHUNK)
    token = begin + inside
    token_ok = token < length
    n = tl.arange(0, N)
    p = tl.arange(0, P)
    n_ok = n < d_state
    p_ok = p < headdim
    crosses_left = token_ok
    crosses_right = token_ok
    if HAS_IDS:
        row_ids = ids + batch * length
        end = tl.minimum(begin + CHUNK, length)
        own_id = tl.load(row_ids + token, mask=token_ok, other=-1)
        if READERS:
            edge_left = tl.load(row_ids + begin - 1, mask=begin > 0, other=-3)
            edge_right = tl.load(row_ids + end, mask=end < length, other=-3)
        else:
            edge_left = tl.load(row_ids + end - 1)
            edge_right = tl.load(row_ids + begin)
        crosses_left = (own_id == edge_left) & (own_id >= 0)
        crosses_right = (own_id == edge_right) & (own_id >= 0)
    logs = (batch * nheads + head) * (nchunks * CHUNK) + begin + inside
    log_f = tl.load(log + logs)
    log_b = tl.load(log + direction_size + logs)
    at_left = token
    at_right = token
    if READERS:
        at_left = token - 1
        at_right = token + 1
    else:
        chunk_at = (batch * nheads + head) * nchunks + chunk
        log_f += tl.load(total + chunk_at)
        log_b += tl.load(total + total_size + chunk_at)
    weight_f = tl.where(crosses_left, tl.exp2(tl.minimum(log_f * LOG2_E, MOST_LOG2)), 0.0)
    weight_b = tl.where(crosses_right, tl.exp2(tl.minimum(log_b * LOG2_E, MOST_LOG2)), 0.0)
    value = tl.load(
        values + batch * value_batch + head * value_head + token[:, None] * value_token + p[None, :],
        mask=token_ok[:, None] & p_ok[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    base = batch * proj_batch + (head // heads_per_group) * proj_group
    mask = ((at_left >= 0) & (at_left < length))[:, None] & n_ok[None, :]
    projection = tl.load(left + base + at_left[:, None] * proj_token + n[None, :], mask=mask, other=0.0).to(DOT)
    state = tl.dot(tl.trans((value * weight_f[:, None]).to(DOT)), projection, input_precision=PRECISION)
    target = ((batch * nchunks + chunk) * nheads + head) * (headdim * d_state) + p[:, None] * d_state + n[None, :]
    stored = p_ok[:, None] & n_ok[None, :]
    tl.store(out + target, state, mask=stored)
    mask = ((at_right >= 0) & (at_right < length))[:, None] & n_ok[None, :]
    projection = tl.load(right + base + at_right[:, None] * proj_token + n[None, :], mask=mask, other=0.0).to(DOT)
    state = tl.dot(tl.trans((value * weight_b[:, None]).to(DOT)), projection, input_precision=PRECISION)
    tl.store(out + state_size + target, state, mask=stored)


@triton.jit
def _carry_kernel(
    gained, total, ids, out, length, nheads, nchunks, size, total_size, state_size,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, REVERSED: tl.constexpr, HAS_IDS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    batch, head = program // nheads, program % nheads
    direction = tl.program_id(1)
    entry = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    entry_ok = entry < size
    ascending = (direction == 0) != REVERSED
    state = tl.zeros([BLOCK], tl.float32)
    for i in range(nchunks):
        chunk = tl.where(ascending, i, nchunks - 1 - i)
        place = direction * state_size + ((batch * nchunks + chunk) * nheads + head) * size + entry
        tl.store(out + place, state, mask=entry_ok)
        keep = tl.exp2(tl.load(total + direction * total_size + program * nchunks + chunk) * LOG2_E)
        if HAS_IDS:
            begin = chunk * CHUNK
            end = tl.minimum(begin + CHUNK, length)
            row_ids = ids + batch * length
            edge = tl.load(row_ids + tl.where(direction == 0, begin - 1, end),
                           mask=tl.where(direction == 0, begin > 0, end < length), other=-3)  # fmt: skip
            leaving = tl.load(row_ids + tl.where(direction == 0, end - 1, begin))
            keep = tl.where(edge == leaving, keep, 0.0)
        state = keep * state + tl.load(gained + place, mask=entry_ok, other=0.0).to(tl.float32)


@triton.jit
def _cross_kernel(
    own, own_f, own_b, own_log, total, ids, state, entered,
    out, grad_own_f, grad_own_b, grad_own_log, cross_sum, kept_sum,
    length, nheads, nchunks, headdim, d_state, direction_size, total_size, state_size,
    own_batch, own_token, own_head, out_batch, out_token, out_head,
    proj_batch, proj_token, proj_group, grad_batch, grad_token, grad_group,
    HEADS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    READERS: tl.constexpr, OUT: tl.constexpr, GRADS: tl.constexpr, HAS_IDS: tl.constexpr,
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
    crosses_left = token_ok
    crosses_right = token_ok
    goes_on_left = begin >= 0
    goes_on_right = begin >= 0
    if HAS_IDS:
        row_ids = ids + batch * length
        own_id = tl.load(row_ids + token, mask=token_ok, other=-1)
        end = tl.minimum(begin + CHUNK, length)
        first = tl.load(row_ids + begin)
        last = tl.load(row_ids + end - 1)
        before = tl.load(row_ids + begin - 1, mask=begin > 0, other=-3)
        after = tl.load(row_ids + end, mask=end < length, other=-3)
        goes_on_left = before == last
        goes_on_right = after == first
        # A reader reads what arrives; a source adds to what leaves.
        if READERS:
            crosses_left = (own_id == before) & (own_id >= 0)
            crosses_right = (own_id == after) & (own_id >= 0)
        else:
            crosses_left = (own_id == last) & (own_id >= 0)
            crosses_right = (own_id == first) & (own_id >= 0)
    own_at_f = token
    own_at_b = token
    if READERS:
        own_at_f = token - 1
        own_at_b = token + 1
    base = batch * proj_batch + group * proj_group
    own_left = load_rows(own_f + base, own_at_f, proj_token, n, n_ok, length).to(DOT)
    own_right = load_rows(own_b + base, own_at_b, proj_token, n, n_ok, length).to(DOT)
    grad_left = tl.zeros([ROWS, N], tl.float32)
    grad_right = tl.zeros([ROWS, N], tl.float32)
    for i in range(HEADS):
        head = group * HEADS + i
        logs = (batch * nheads + head) * (nchunks * CHUNK) + begin
        log_f = tl.load(own_log + logs + row)
        log_b = tl.load(own_log + direction_size + logs + row)
        chunk_at = (batch * nheads + head) * nchunks + chunk
        if not READERS:
            log_f += tl.load(total + chunk_at)
            log_b += tl.load(total + total_size + chunk_at)
        cross_f = tl.where(crosses_left, tl.exp2(tl.minimum(log_f * LOG2_E, MOST_LOG2)), 0.0)
        cross_b = tl.where(crosses_right, tl.exp2(tl.minimum(log_b * LOG2_E, MOST_LOG2)), 0.0)
        state_at = ((batch * nchunks + chunk) * nheads + head) * (headdim * d_state)
        state_place = state_at + p[:, None] * d_state + n[None, :]
        state_ok = p_ok[:, None] & n_ok[None, :]
        state_f = tl.load(state + state_place, mask=state_ok, other=0.0)
        state_b = tl.load(state + state_size + state_place, mask=state_ok, other=0.0)
        mixed_f = tl.dot(own_left, tl.trans(state_f.to(DOT)), input_precision=PRECISION) * cross_f[:, None]
        mixed_b = tl.dot(own_right, tl.trans(state_b.to(DOT)), input_precision=PRECISION) * cross_b[:, None]
        if GRADS:
            mine = load_rows(own + batch * own_batch + head * own_head, token, own_token, p, p_ok, length)
            mine = mine.to(tl.float32)
            # `out` may be where `own` stands.
            tl.debug_barrier()
        if OUT:
            target = out + batch * out_batch + head * out_head + token[:, None] * out_token + p[None, :]
            tl.store(target, mixed_f + mixed_b, mask=token_ok[:, None] & p_ok[None, :])
        if GRADS:
            sum_f = tl.sum(mixed_f * mine, axis=1)
            sum_b = tl.sum(mixed_b * mine, axis=1)
            log_places = grad_own_log + logs + row
            tl.store(log_places, tl.load(log_places) + sum_f)
            tl.store(log_places + direction_size, tl.load(log_places + direction_size) + sum_b)
            grad_left += tl.dot((mine * cross_f[:, None]).to(DOT), state_f.to(DOT), input_precision=PRECISION)
            grad_right += tl.dot((mine * cross_b[:, None]).to(DOT), state_b.to(DOT), input_precision=PRECISION)
            if not READERS:
                sums_at = chunk_at * (CHUNK // ROWS) + block
                tl.store(cross_sum + sums_at, tl.sum(sum_f, axis=0))
                tl.store(cross_sum + total_size * (CHUNK // ROWS) + sums_at, tl.sum(sum_b, axis=0))
                if block == 0:
                    came_f = tl.load(entered + state_place, mask=state_ok, other=0.0).to(tl.float32)
                    came_b = tl.load(entered + state_size + state_place, mask=state_ok, other=0.0).to(tl.float32)
                    kept_f = tl.sum(tl.sum(came_f * state_f.to(tl.float32), axis=1), axis=0)
                    kept_b = tl.sum(tl.sum(came_b * state_b.to(tl.float32), axis=1), axis=0)
                    tl.store(kept_sum + chunk_at, tl.where(goes_on_left, kept_f, 0.0))
                    tl.store(kept_sum + total_size + chunk_at, tl.where(goes_on_right, kept_b, 0.0))
    if GRADS:
        if READERS:
            # As in the gradients' kernel: the row without a neighbour adds what is zero.
            own_at_f = tl.where(token == 0, length - 1, own_at_f)
            own_at_b = tl.where(token == length - 1, 0, own_at_b)
        base = batch * grad_batch + group * grad_group
        mask = token_ok[:, None] & n_ok[None, :]
        places = grad_own_f + base + own_at_f[:, None] * grad_token + n[None, :]
        tl.store(places, tl.load(places, mask=mask, other=0.0).to(tl.float32) + grad_left, mask=mask)
        places = grad_own_b + base + own_at_b[:, None] * grad_token + n[None, :]
        tl.store(places, tl.load(places, mask=mask, other=0.0).to(tl.float32) + grad_right, mask=mask)


def gather_states(side: Side, weights: LogWeights, sequence_id: Tensor | None, *, readers: bool) -> Tensor:
    """What each chunk adds to the state that passes it: of the sources, or of the readers (in the backward pass, what
    they ask of the state they read): [2, batch, nchunks, nheads, headdim, d_state]."""
    x = side.values
    assert x is not None
    batch, length, nheads, headdim = x.shape
    ngroups, d_state = side.left.shape[2:]
    out = torch.empty(2, batch, weights.nchunks, nheads, headdim, d_state, dtype=x.dtype, device=x.device)
    _gather_kernel[(batch * weights.nchunks, nheads)](
        x, side.left, side.right, side.log, weights.total, sequence_id, out,
        length, nheads, weights.nchunks, headdim, d_state, nheads // ngroups, side.log[0].numel(),
        weights.total[0].numel(), out[0].numel(), *x.stride()[:3], *side.left.stride()[:3],
        CHUNK=weights.chunk, P=block_of(headdim), N=block_of(d_state), READERS=readers,
        HAS_IDS=sequence_id is not None, **dot_options(x.dtype), num_warps=4, num_stages=1,
    )  # fmt: skip
    return out


def carry_states(
    gained: Tensor, weights: LogWeights, sequence_id: Tensor | None, length: int, *, backwards: bool
) -> Tensor:
    """The states that enter each chunk, from what each adds; `backwards` goes against both directions."""
    out = gained.new_empty(gained.shape)
    _, batch, nchunks, nheads, headdim, d_state = gained.shape
    size = headdim * d_state
    _carry_kernel[(batch * nheads, 2, triton.cdiv(size, ENTRIES_AT_ONCE))](
        gained, weights.total, sequence_id, out, length, nheads, nchunks, size, weights.total[0].numel(),
        gained[0].numel(), CHUNK=weights.chunk, BLOCK=ENTRIES_AT_ONCE, REVERSED=backwards,
        HAS_IDS=sequence_id is not None, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


def launch_cross(
    own: Side,
    weights: LogWeights,
    sequence_id: Tensor | None,
    states: Tensor,
    *,
    readers: bool,
    out: Tensor | None = None,
    grads: Gradients | None = None,
    entered: Tensor | None = None,
) -> Tensor | None:
    """Write what the own tokens get from other chunks into `out`, which may be where their values stand and to which
    `launch_mix` adds; add the gradients to those of `launch_gradients`.

    states: what the own tokens meet. entered: the states that the readers met, which the gradient of a chunk's total
    needs. Returns that gradient, [2, batch, nheads, nchunks], for sources with gradients.
    """
    like = own.values if out is None else out
    assert like is not None
    batch, length, nheads, headdim = like.shape
    ngroups, d_state = own.left.shape[2:]
    rows = min(CROSS_ROWS, weights.chunk)
    of_total = kept = None
    if grads is not None and not readers:
        of_total = weights.total.new_empty(*weights.total.shape, weights.chunk // rows)
        kept = torch.empty_like(weights.total)
    mine = like if own.values is None else own.values
    target = mine if out is None else out
    written = grads or Gradients(own.left, own.left, own.log)
    _cross_kernel[(batch * weights.nchunks, weights.chunk // rows, ngroups)](
        mine, own.left, own.right, own.log, weights.total, sequence_id, states, entered,
        target, written.left, written.right, written.log, of_total, kept,
        length, nheads, weights.nchunks, headdim, d_state, own.log[0].numel(), weights.total[0].numel(),
        states[0].numel(), *mine.stride()[:3], *target.stride()[:3], *own.left.stride()[:3], *written.left.stride()[:3],
        HEADS=nheads // ngroups, CHUNK=weights.chunk, ROWS=rows, P=block_of(headdim), N=block_of(d_state),
        READERS=readers, OUT=out is not None, GRADS=grads is not None, HAS_IDS=sequence_id is not None,
        **dot_options(states.dtype), num_warps=CROSS_WARPS, num_stages=CROSS_STAGES,
    )  # fmt: skip
    if of_total is None or kept is None:
        return None
    return of_total.sum(-1) + kept * torch.exp(weights.total)
