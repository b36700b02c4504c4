"""Triton: the states that chunks leave, and their journey from chunk to chunk, in both directions at once."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from anymixer_kernels.quasiseparable.triton_log_weights import LogWeights
from anymixer_kernels.quasiseparable.triton_tiles import (
    Side,
    Tiling,
    crossing,
    crossing_weights,
    ids_of,
    load_projection,
    load_rows,
    place_of_program,
)
from anymixer_kernels.triton_common import block_of, dot_options

# Chosen offline, by registers and instructions; `benchmarks/hydra_kernels.py --tune` tries others. Heads that a program
# gathers one after another, and its tiling; entries of a state that a program carries, and its warps.
GATHER_HEADS, GATHER_TILING = 8, Tiling(rows=128, warps=4, stages=3)
CARRY_ENTRIES, CARRY_WARPS = 256, 1


@triton.jit
def _gather_kernel(
    values, left, right, log, total, ids, out,
    length, nheads, nchunks, total_size, state_size, value_batch, proj_batch,
    headdim: tl.constexpr, d_state: tl.constexpr, value_token: tl.constexpr, value_head: tl.constexpr,
    proj_token: tl.constexpr, proj_group: tl.constexpr,
    HEADS: tl.constexpr, LOOP: tl.constexpr, CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    READERS: tl.constexpr, HAS_IDS: tl.constexpr, WHOLE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch, begin, _ = place_of_program(nchunks, CHUNK, CHUNK)
    chunk = begin // CHUNK
    first_head = tl.program_id(1) * LOOP
    row = tl.arange(0, CHUNK)
    n = tl.arange(0, N)
    p = tl.arange(0, P)
    own_id = ids_of(ids, batch, begin + row, length, -1, HAS_IDS)
    crosses_left, crosses_right = crossing(ids, batch, own_id, begin, length, CHUNK, READERS, HAS_IDS)
    reach: tl.constexpr = 1 if READERS else 0
    base = batch * proj_batch + begin * proj_token + first_head // HEADS * proj_group
    own_left = load_projection(left + base, row, proj_token, n, d_state, begin, length, -reach, DOT)
    own_right = load_projection(right + base, row, proj_token, n, d_state, begin, length, reach, DOT)
    values_at = values + batch * value_batch + begin * value_token
    stored = (p < headdim)[:, None] & (n < d_state)[None, :]
    for i in range(LOOP):
        head = first_head + i
        place = (batch * nchunks + chunk) * nheads + head
        weight_f, weight_b = crossing_weights(
            log + place * (2 * CHUNK), total + (batch * nheads + head) * nchunks + chunk, crosses_left, crosses_right,
            row, total_size, CHUNK, READERS,
        )  # fmt: skip
        value = load_rows(values_at + head * value_head, row, value_token, p, headdim, begin, length, WHOLE).to(DOT)
        target = out + place * (headdim * d_state) + p[:, None] * d_state + n[None, :]
        state = tl.dot(tl.trans(value), (own_left * weight_f[:, None]).to(DOT), input_precision=PRECISION)
        tl.store(target, state, mask=stored)
        state = tl.dot(tl.trans(value), (own_right * weight_b[:, None]).to(DOT), input_precision=PRECISION)
        tl.store(target + state_size, state, mask=stored)


@triton.jit
def _met_at(places, step, stride, nchunks, ok):
    """What stands at the chunk of a step of the journey, 0 after its end."""
    return tl.load(places + step * stride, mask=ok & (step < nchunks), other=0.0)


@triton.jit
def _kept_at(total, ids, chunk, length, direction, is_there, CHUNK: tl.constexpr, HAS_IDS: tl.constexpr):
    """What a chunk leaves of the state that passes it: nothing if its sequence ends there."""
    keep = tl.exp2(tl.load(total + chunk, mask=is_there, other=0.0))
    if HAS_IDS:
        begin = chunk * CHUNK
        end = tl.minimum(begin + CHUNK, length)
        ascending = direction == 0
        is_inside = tl.where(ascending, begin > 0, end < length)
        edge = tl.load(ids + tl.where(ascending, begin - 1, end), mask=is_there & is_inside, other=-3)
        leaving = tl.load(ids + tl.where(ascending, end - 1, begin), mask=is_there, other=-3)
        keep = tl.where(edge == leaving, keep, 0.0)
    return keep


@triton.jit
def _pass(state, gain, keep, came, step, nchunks, places, stride, kept, kept_stride, ok, REVERSED: tl.constexpr):
    """Write the state that enters the chunk of a step, return the one that leaves it."""
    is_there = step < nchunks
    tl.store(places + step * stride, state, mask=ok & is_there)
    if REVERSED:
        # What passes through the chunk, as the readers beyond it weigh it: the gradient of the chunk's decay.
        tl.store(kept + step * kept_stride, keep * tl.sum(came.to(tl.float32) * state, axis=0), mask=is_there)
    return keep * state + gain.to(tl.float32)


@triton.jit
def _carry_kernel(
    states, entered, total, ids, kept, length, nheads, nchunks, size, total_size, state_size, kept_width,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, REVERSED: tl.constexpr, HAS_IDS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    batch, head = program // nheads, program % nheads
    direction = tl.program_id(1)
    part = tl.program_id(2)
    entry = part * BLOCK + tl.arange(0, BLOCK)
    ok = entry < size
    ascending = (direction == 0) != REVERSED
    onward = tl.where(ascending, 1, -1)
    first = tl.where(ascending, 0, nchunks - 1)
    places = direction * state_size + ((batch * nchunks + first) * nheads + head) * size + entry
    stride = (onward * nheads * size).to(tl.int64)
    gains = states + places
    total += direction * total_size + program * nchunks
    if HAS_IDS:
        ids += batch * length
    if REVERSED:
        kept += (direction * total_size + program * nchunks + first) * kept_width + part
    kept_stride = onward * kept_width
    # What a chunk adds is read, and what enters it written to the same place, by this program alone. Four are read at
    # once, because a read that stands below a write waits by itself for the memory.
    state = tl.zeros([BLOCK], tl.float32)
    a = 0
    # Triton 3.6's interpreter takes no range of an argument.
    while a < nchunks:
        b, c, d = a + 1, a + 2, a + 3
        keep_a = _kept_at(total, ids, first + onward * a, length, direction, a < nchunks, CHUNK, HAS_IDS)
        keep_b = _kept_at(total, ids, first + onward * b, length, direction, b < nchunks, CHUNK, HAS_IDS)
        keep_c = _kept_at(total, ids, first + onward * c, length, direction, c < nchunks, CHUNK, HAS_IDS)
        keep_d = _kept_at(total, ids, first + onward * d, length, direction, d < nchunks, CHUNK, HAS_IDS)
        gain_a = _met_at(gains, a, stride, nchunks, ok)
        gain_b = _met_at(gains, b, stride, nchunks, ok)
        gain_c = _met_at(gains, c, stride, nchunks, ok)
        gain_d = _met_at(gains, d, stride, nchunks, ok)
        came_a, came_b, came_c, came_d = gain_a, gain_b, gain_c, gain_d  # read in the backward pass only
        if REVERSED:
            came_a = _met_at(entered + places, a, stride, nchunks, ok)
            came_b = _met_at(entered + places, b, stride, nchunks, ok)
            came_c = _met_at(entered + places, c, stride, nchunks, ok)
            came_d = _met_at(entered + places, d, stride, nchunks, ok)
        state = _pass(state, gain_a, keep_a, came_a, a, nchunks, gains, stride, kept, kept_stride, ok, REVERSED)
        state = _pass(state, gain_b, keep_b, came_b, b, nchunks, gains, stride, kept, kept_stride, ok, REVERSED)
        state = _pass(state, gain_c, keep_c, came_c, c, nchunks, gains, stride, kept, kept_stride, ok, REVERSED)
        state = _pass(state, gain_d, keep_d, came_d, d, nchunks, gains, stride, kept, kept_stride, ok, REVERSED)
        a += 4


def gather_states(side: Side, weights: LogWeights, sequence_id: Tensor | None, *, readers: bool) -> Tensor:
    """What each chunk adds to the state that passes it: of the sources, or of the readers (in the backward pass, what
    they ask of the state they read): [2, batch, nchunks, nheads, headdim, d_state]."""
    x = side.values
    assert x is not None
    batch, length, nheads, headdim = x.shape
    ngroups, d_state = side.left.shape[2:]
    heads = nheads // ngroups
    loop = math.gcd(heads, GATHER_HEADS)
    out = torch.empty(2, batch, weights.nchunks, nheads, headdim, d_state, dtype=x.dtype, device=x.device)
    _gather_kernel[(batch * weights.nchunks, nheads // loop)](
        x, side.left, side.right, side.log, weights.total, sequence_id, out,
        length, nheads, weights.nchunks, weights.total[0].numel(), out[0].numel(), x.stride(0), side.left.stride(0),
        headdim, d_state, *x.stride()[1:3], *side.left.stride()[1:3],
        HEADS=heads, LOOP=loop, CHUNK=weights.chunk, P=block_of(headdim), N=block_of(d_state), READERS=readers,
        HAS_IDS=sequence_id is not None, WHOLE=length % weights.chunk == 0, **dot_options(x.dtype),
        **GATHER_TILING.options(weights.chunk * headdim * x.itemsize),
    )  # fmt: skip
    return out


def carry_states(
    states: Tensor,
    weights: LogWeights,
    sequence_id: Tensor | None,
    length: int,
    entered: Tensor | None = None,
    spare: int = 0,
) -> Tensor | None:
    """Over what each chunk adds, contiguous, write the states that enter each.

    With `entered`, which the readers met, the way back: what is asked of the states that leave each chunk. Returns then
    the gradient of each chunk's total by what passes through it, in parts to be summed: [2, batch, nheads, nchunks,
    parts + spare], the last `spare` for others to write; else None.
    """
    _, batch, nchunks, nheads, headdim, d_state = states.shape
    size = headdim * d_state
    parts = triton.cdiv(size, CARRY_ENTRIES)
    kept = None if entered is None else weights.total.new_empty(*weights.total.shape, parts + spare)
    _carry_kernel[(batch * nheads, 2, parts)](
        states, entered, weights.total, sequence_id, kept, length, nheads, nchunks, size, weights.total[0].numel(),
        states[0].numel(), parts + spare, CHUNK=weights.chunk, BLOCK=CARRY_ENTRIES, REVERSED=entered is not None,
        HAS_IDS=sequence_id is not None, num_warps=CARRY_WARPS, num_stages=3,
    )  # fmt: skip
    return kept
