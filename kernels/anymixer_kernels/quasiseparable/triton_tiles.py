"""Triton: what the kernels of quasiseparable mixing share: where a program stands, and tiles of a chunk's matrix.

Each kernel sees the op from one side. Its *own* tokens are ROWS of a chunk's, the *other* ones all of its tokens. Where
the own tokens read (C, row), the others are the sources (B, col); where they are read, the sides change places.

A chunk is one block of ROWS tokens or two. The *near* tile pairs a block with itself: a triangle for each direction,
each pair with an exponential of its own. The *far* tile pairs it with the other block, all of it in one direction: with
the decay up to the edge between the blocks taken out, its weights are one factor for each own token times one for each
other token, both at most a step size.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

# Exponents of pairs that M does not hold are unbounded; this keeps 0 times their weight 0.
MOST_LOG2 = tl.constexpr(60.0)
# Of shared memory, for what a program loads ahead.
SHARED_BYTES = 72 * 1024


@dataclass(frozen=True)
class Side:
    """One side of the product. values: [batch, length, nheads, headdim], last axis of stride 1, or None where they are
    not read. left, right: [batch, length, ngroups, d_state], C or B; all four projections of a call have the same
    strides, the last 1. log: row or col."""

    values: Tensor | None
    left: Tensor
    right: Tensor
    log: Tensor


@dataclass(frozen=True)
class Tiling:
    """rows: own tokens of a program, at least half a chunk. warps, stages (at most), registers (at most, a thread): as
    Triton calls them."""

    rows: int
    warps: int
    stages: int
    registers: int | None = None

    def rows_of(self, chunk: int) -> int:
        """Own tokens of a program in chunks of `chunk` tokens."""
        return max(min(self.rows, chunk), chunk // 2)

    def options(self, loaded: int) -> dict[str, int | None]:
        """Of a launch whose programs load `loaded` bytes for each head: as many stages as let two programs share a
        multiprocessor."""
        stages = max(1, min(self.stages, SHARED_BYTES // loaded))
        return {"num_warps": self.warps, "num_stages": stages, "maxnreg": self.registers}


@triton.jit
def place_of_program(nchunks, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    """(batch entry, its chunk's first token, block of the chunk), the first two in 64 bits. Blocks of one chunk are
    neighbours in time, so that the second finds in the L2 cache what both read."""
    BLOCKS: tl.constexpr = CHUNK // ROWS
    program = tl.program_id(0)
    chunk = (program // BLOCKS).to(tl.int64)
    return chunk // nchunks, chunk % nchunks * CHUNK, program % BLOCKS


@triton.jit
def load_rows(pointer, at, stride, column, width, begin, length, WHOLE: tl.constexpr):
    """Rows begin + at of a matrix of `length` rows and `width` columns, 0 outside it: [rows, columns]. pointer: at row
    `begin`. WHOLE promises that all rows are inside. Offsets stay in 32 bits, and with the sizes compiled in they cost
    next to nothing."""
    places = pointer + at[:, None] * stride + column[None, :]
    if WHOLE:
        return tl.load(places, mask=(column < width)[None, :], other=0.0)
    else:
        token = begin + at
        inside = (token >= 0) & (token < length)
        return tl.load(places, mask=inside[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def ids_of(ids, batch, token, length, OUTSIDE: tl.constexpr, HAS_IDS: tl.constexpr):
    """The sequences of tokens, OUTSIDE beyond the row; without ids, one sequence."""
    if HAS_IDS:
        return tl.load(ids + batch * length + token, mask=token < length, other=OUTSIDE).to(tl.int32)
    else:
        return tl.where(token < length, 0, OUTSIDE)


@triton.jit
def of_one_sequence(own_id, other_id):
    """Pairs of tokens of one sequence: bool [own, other]."""
    return (own_id[:, None] == other_id[None, :]) & (own_id >= 0)[:, None]


@triton.jit
def is_from_left(inside, READERS: tl.constexpr):
    """Near pairs in which the own token reads, or is read, from the left; any value on the diagonal."""
    if READERS:
        return inside[:, None] > inside[None, :]
    else:
        return inside[:, None] < inside[None, :]


@triton.jit
def near_pairs(own_id, inside, HAS_IDS: tl.constexpr):
    """Which near pairs M holds off its diagonal."""
    held = inside[:, None] != inside[None, :]
    if HAS_IDS:
        held = held & of_one_sequence(own_id, own_id)
    return held


@triton.jit
def load_projection(pointer, row, stride, n, d_state, begin, length, REACH: tl.constexpr, DOT: tl.constexpr):
    """C or B of the tokens REACH away from `row`. Readers use their neighbour's C: what its state held before they
    came. The neighbour may stand in another chunk, or nowhere."""
    return load_rows(pointer, row + REACH, stride, n, d_state, begin, length, False).to(DOT)


@triton.jit
def near_weights(own_log_f, own_log_b, log, row, inside, CHUNK: tl.constexpr, READERS: tl.constexpr):
    """2 to the sum of both tokens' logarithms, by the direction of each near pair. log: where the chunk's logarithms of
    the other side begin."""
    other_log_f = tl.load(log + row)
    other_log_b = tl.load(log + CHUNK + row)
    exponent = tl.where(
        is_from_left(inside, READERS),
        own_log_f[:, None] + other_log_f[None, :],
        own_log_b[:, None] + other_log_b[None, :],
    )
    return tl.exp2(tl.minimum(exponent, MOST_LOG2))


@triton.jit
def is_far_from_left(block, READERS: tl.constexpr):
    """Whether the far tile's own tokens read, or are read, from the left."""
    if READERS:
        return block == 1
    else:
        return block == 0


@triton.jit
def load_far_projection(
    other_f, other_b, far, from_left, stride, n, d_state, begin, length, READERS: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """C or B of the other block, of the far tile's direction."""
    at = far
    if not READERS:
        at = far + tl.where(from_left, -1, 1)
    pointer = tl.where(from_left, other_f, other_b)
    return load_rows(pointer, at, stride, n, d_state, begin, length, False).to(DOT)


@triton.jit
def similarities(
    own_f, own_b, other_f, other_b, ids, batch, begin, length, row, far, inside, n, d_state, stride, far_from_left,
    READERS: tl.constexpr, FAR: tl.constexpr, HAS_IDS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The own tokens' C or B of both directions, and C . B of each pair that M holds, else 0: of the near tile and,
    where the chunk has two blocks, of the far one. Pointers: at the chunk's first token and the program's group."""
    reach: tl.constexpr = 1 if READERS else 0
    other_reach: tl.constexpr = 1 - reach
    own_id = ids_of(ids, batch, begin + row, length, -1, HAS_IDS)
    own_left = load_projection(own_f, row, stride, n, d_state, begin, length, -reach, DOT)
    own_right = load_projection(own_b, row, stride, n, d_state, begin, length, reach, DOT)
    others = load_projection(other_f, row, stride, n, d_state, begin, length, -other_reach, DOT)
    left = tl.dot(own_left, tl.trans(others), input_precision=PRECISION)
    others = load_projection(other_b, row, stride, n, d_state, begin, length, other_reach, DOT)
    right = tl.dot(own_right, tl.trans(others), input_precision=PRECISION)
    near = tl.where(is_from_left(inside, READERS), left, right)
    near = tl.where(near_pairs(own_id, inside, HAS_IDS), near, 0.0)
    beyond = near
    if FAR:
        others = load_far_projection(
            other_f, other_b, far, far_from_left, stride, n, d_state, begin, length, READERS, DOT
        )
        own_far = tl.where(far_from_left, own_left, own_right)
        beyond = tl.dot(own_far, tl.trans(others), input_precision=PRECISION)
        if HAS_IDS:
            far_id = ids_of(ids, batch, begin + far, length, -2, HAS_IDS)
            beyond = tl.where(of_one_sequence(own_id, far_id), beyond, 0.0)
    return own_left, own_right, near, beyond


@triton.jit
def far_factors(
    own_log_f, own_log_b, own_log, other_log, far, from_left, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    READERS: tl.constexpr,
):  # fmt: skip
    """(own, other) factors of the far tile's weights. own_log_f, own_log_b: of the own tokens; own_log, other_log:
    where the chunk's logarithms begin."""
    direction = tl.where(from_left, 0, CHUNK)
    # What the first reader beyond the edge has in its logarithm: the decay between the chunk's end and the edge.
    edge = direction + tl.where(from_left, ROWS, ROWS - 1)
    mine = tl.where(from_left, own_log_f, own_log_b)
    theirs = tl.load(other_log + direction + far)
    if READERS:
        passed = tl.load(own_log + edge)
        return tl.exp2(mine - passed), tl.exp2(theirs + passed)
    else:
        passed = tl.load(other_log + edge)
        return tl.exp2(mine + passed), tl.exp2(theirs - passed)


@triton.jit
def crossing(ids, batch, own_id, begin, length, CHUNK: tl.constexpr, READERS: tl.constexpr, HAS_IDS: tl.constexpr):
    """Which own tokens meet the state that comes from the left, and from the right: a reader reads what arrives in its
    chunk, a source adds to what leaves it."""
    if HAS_IDS:
        row_ids = ids + batch * length
        end = tl.minimum(begin + CHUNK, length)
        if READERS:
            from_left = tl.load(row_ids + begin - 1, mask=begin > 0, other=-3)
            from_right = tl.load(row_ids + end, mask=end < length, other=-3)
        else:
            from_left = tl.load(row_ids + end - 1)
            from_right = tl.load(row_ids + begin)
        real = own_id >= 0
        return real & (own_id == from_left.to(tl.int32)), real & (own_id == from_right.to(tl.int32))
    else:
        return own_id >= 0, own_id >= 0


@triton.jit
def crossing_weights(
    log, total, crosses_left, crosses_right, row, total_size, CHUNK: tl.constexpr, READERS: tl.constexpr
):  # fmt: skip
    """What own tokens weigh in the states that they meet, of both directions. log, total: where the head's stand."""
    log_f = tl.load(log + row)
    log_b = tl.load(log + CHUNK + row)
    if not READERS:
        log_f += tl.load(total)
        log_b += tl.load(total + total_size)
    weight_f = tl.where(crosses_left, tl.exp2(log_f), 0.0)
    weight_b = tl.where(crosses_right, tl.exp2(log_b), 0.0)
    return weight_f, weight_b


@triton.jit
def load_state(state, p, n, headdim: tl.constexpr, d_state: tl.constexpr, DOT: tl.constexpr):
    """A head's state, 0 beyond its sizes: [p, n]."""
    mask = (p < headdim)[:, None] & (n < d_state)[None, :]
    return tl.load(state + p[:, None] * d_state + n[None, :], mask=mask, other=0.0).to(DOT)
