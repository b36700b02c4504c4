"""The depthwise convolution with its bias and its SiLU in one kernel, and all its gradients in another.

A program is one warp, which goes through the tokens of one row four at a time with a block of channels side by side in
its threads: sums over tokens stay inside a thread, and what it loads and converts serves four tokens. The backward
kernel computes u = conv(x) again and writes du = grad_y silu'(u) into a ring of a few tokens of its own, from which it
reads the neighbours of the tokens behind. No program reads what another one has written.
"""

import triton
import triton.language as tl

from anymixer_kernels.triton_math import sigmoid


@triton.jit
def _id_at(ids, token, length):
    """The sequence id of a token of the row that ids points to; -1 outside of it."""
    inside = (token >= 0) & (token < length)
    return tl.where(inside, 0, -1) if ids is None else tl.load(ids + token, mask=inside, other=-1).to(tl.int32)


@triton.jit
def _at(places, token, token_stride, its_id, inside):
    """The channels of a token, in float32; 0 in padding."""
    found = tl.load(places + token.to(tl.int64) * token_stride, mask=inside & (its_id >= 0), other=0.0)
    return found.to(tl.float32)


@triton.jit
def _of(value, own, its_id, ids):
    """The value of a token for another one: 0 in another sequence. Values in padding are 0 already."""
    if ids is not None:
        value = tl.where(own == its_id, value, 0.0)
    return value


@triton.jit
def _convolve(
    x, taps, bias, ids, token, own0, own1, own2, own3, inside, length, channels, x_token,
    WIDTH: tl.constexpr, REACH: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """conv(x) + bias of four tokens; x, taps and bias point to the program's channels, x and ids to its row."""
    u0 = tl.zeros([BLOCK_C], tl.float32)
    if bias is not None:
        u0 += tl.load(bias, mask=inside, other=0.0).to(tl.float32)
    u1, u2, u3 = u0, u0, u0
    id0, id1 = _id_at(ids, token - REACH, length), _id_at(ids, token + (1 - REACH), length)
    id2 = _id_at(ids, token + (2 - REACH), length)
    x0, x1 = _at(x, token - REACH, x_token, id0, inside), _at(x, token + (1 - REACH), x_token, id1, inside)
    x2 = _at(x, token + (2 - REACH), x_token, id2, inside)
    for tap in tl.static_range(WIDTH):
        last = token + (tap + 3 - REACH)
        id3 = _id_at(ids, last, length)
        x3 = _at(x, last, x_token, id3, inside)
        factor = tl.load(taps + tap * channels, mask=inside, other=0.0).to(tl.float32)
        u0 += factor * _of(x0, own0, id0, ids)
        u1 += factor * _of(x1, own1, id1, ids)
        u2 += factor * _of(x2, own2, id2, ids)
        u3 += factor * _of(x3, own3, id3, ids)
        x0, x1, x2 = x1, x2, x3
        id0, id1, id2 = id1, id2, id3
    return u0, u1, u2, u3


@triton.jit
def _write(places, token, token_stride, own, inside, length, y, ACTIVATE: tl.constexpr):
    if ACTIVATE:
        y = y * sigmoid(y)
    y = tl.where(own >= 0, y, 0.0).to(places.dtype.element_ty)
    tl.store(places + token.to(tl.int64) * token_stride, y, mask=inside & (token < length))


@triton.jit
def forward_kernel(
    x, taps, bias, ids, out, length, channels, x_row, x_token, ids_row, out_row, out_token,
    WIDTH: tl.constexpr, REACH: tl.constexpr, ACTIVATE: tl.constexpr, TOKENS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(channels, BLOCK_C)
    parts = tl.cdiv(length, TOKENS)
    channel = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    row = (tl.program_id(0) // blocks // parts).to(tl.int64)
    first = (tl.program_id(0) // blocks % parts) * TOKENS
    if ids is not None:
        ids += row * ids_row
    if bias is not None:
        bias += channel
    out_places = out + row * out_row + channel
    for group in range(TOKENS // 4):
        token = first + group * 4
        own0, own1 = _id_at(ids, token, length), _id_at(ids, token + 1, length)
        own2, own3 = _id_at(ids, token + 2, length), _id_at(ids, token + 3, length)
        u0, u1, u2, u3 = _convolve(
            x + row * x_row + channel, taps + channel, bias, ids, token, own0, own1, own2, own3, inside, length,
            channels, x_token, WIDTH, REACH, BLOCK_C,
        )  # fmt: skip
        _write(out_places, token, out_token, own0, inside, length, u0, ACTIVATE)
        _write(out_places, token + 1, out_token, own1, inside, length, u1, ACTIVATE)
        _write(out_places, token + 2, out_token, own2, inside, length, u2, ACTIVATE)
        _write(out_places, token + 3, out_token, own3, inside, length, u3, ACTIVATE)


@triton.jit
def _write_du(grad_y, token, grad_y_token, own, inside, u, ring, RING: tl.constexpr, BLOCK_C: tl.constexpr):
    gate = sigmoid(u)
    du = _at(grad_y, token, grad_y_token, own, inside) * (gate * (1.0 + u * (1.0 - gate)))
    tl.store(ring + (token & (RING - 1)) * BLOCK_C, du.to(ring.dtype.element_ty))


@triton.jit
def _fill_ring(
    grad_y, x, taps, bias, ids, ring, token, inside, length, channels, grad_y_token, x_token,
    WIDTH: tl.constexpr, REACH: tl.constexpr, RING: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """du of four tokens, 0 in padding."""
    own0, own1 = _id_at(ids, token, length), _id_at(ids, token + 1, length)
    own2, own3 = _id_at(ids, token + 2, length), _id_at(ids, token + 3, length)
    u0, u1, u2, u3 = _convolve(
        x, taps, bias, ids, token, own0, own1, own2, own3, inside, length, channels, x_token, WIDTH, REACH, BLOCK_C
    )
    _write_du(grad_y, token, grad_y_token, own0, inside, u0, ring, RING, BLOCK_C)
    _write_du(grad_y, token + 1, grad_y_token, own1, inside, u1, ring, RING, BLOCK_C)
    _write_du(grad_y, token + 2, grad_y_token, own2, inside, u2, ring, RING, BLOCK_C)
    _write_du(grad_y, token + 3, grad_y_token, own3, inside, u3, ring, RING, BLOCK_C)


@triton.jit
def _du_at(
    grad_y, ring, token, grad_y_token, its_id, inside,
    ACTIVATE: tl.constexpr, RING: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    if ACTIVATE:
        du = tl.load(ring + (token & (RING - 1)) * BLOCK_C, mask=inside & (its_id >= 0), other=0.0).to(tl.float32)
    else:
        du = _at(grad_y, token, grad_y_token, its_id, inside)
    return du


@triton.jit
def _store_grad(grad_x, token, grad_x_token, inside, length, dx):
    places = grad_x + token.to(tl.int64) * grad_x_token
    tl.store(places, dx.to(grad_x.dtype.element_ty), mask=inside & (token < length))


@triton.jit
def backward_kernel(
    grad_y, x, taps, bias, ids, rings, grad_x, sums, length, channels,
    grad_y_row, grad_y_token, x_row, x_token, ids_row, grad_x_row, grad_x_token,
    WIDTH: tl.constexpr, REACH: tl.constexpr, ACTIVATE: tl.constexpr, TOKENS: tl.constexpr, BLOCK_C: tl.constexpr,
    LEAD: tl.constexpr, LAG: tl.constexpr, RING: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of a row. The ring starts LEAD tokens before them and runs LAG tokens ahead, multiples of four.

    sums: [programs / blocks, SUMS, channels], for each tap and, after them, the bias. rings: [programs, RING, BLOCK_C].
    """
    blocks = tl.cdiv(channels, BLOCK_C)
    parts = tl.cdiv(length, TOKENS)
    lane = tl.arange(0, BLOCK_C)
    channel = (tl.program_id(0) % blocks) * BLOCK_C + lane
    inside = channel < channels
    part = (tl.program_id(0) // blocks).to(tl.int64)
    row = part // parts
    first = (part % parts).to(tl.int32) * TOKENS
    if ids is not None:
        ids += row * ids_row
    if bias is not None:
        bias += channel
    grad_y += row * grad_y_row
    x += row * x_row
    taps_here = taps + channel
    ring = rings
    if ACTIVATE:
        ring = rings + tl.program_id(0).to(tl.int64) * (RING * BLOCK_C) + lane
        for group in range((LEAD + LAG) // 4):
            token = first - LEAD + group * 4
            _fill_ring(
                grad_y + channel, x + channel, taps_here, bias, ids, ring, token, inside, length, channels,
                grad_y_token, x_token, WIDTH, REACH, RING, BLOCK_C,
            )  # fmt: skip
    kind = tl.arange(0, SUMS)[:, None]
    total = tl.zeros([SUMS, BLOCK_C], tl.float32)
    for group in range(TOKENS // 4):
        token = first + group * 4
        if ACTIVATE:
            _fill_ring(
                grad_y + channel, x + channel, taps_here, bias, ids, ring, token + LAG, inside, length, channels,
                grad_y_token, x_token, WIDTH, REACH, RING, BLOCK_C,
            )  # fmt: skip
            tl.debug_barrier()
        own0, own1 = _id_at(ids, token, length), _id_at(ids, token + 1, length)
        own2, own3 = _id_at(ids, token + 2, length), _id_at(ids, token + 3, length)
        x0, x1 = _at(x + channel, token, x_token, own0, inside), _at(x + channel, token + 1, x_token, own1, inside)
        x2, x3 = _at(x + channel, token + 2, x_token, own2, inside), _at(x + channel, token + 3, x_token, own3, inside)
        dx0 = tl.zeros([BLOCK_C], tl.float32)
        dx1, dx2, dx3 = dx0, dx0, dx0
        # From the last tap on, so that the tokens of du follow each other.
        before: tl.constexpr = REACH + 1 - WIDTH
        id0, id1 = _id_at(ids, token + before, length), _id_at(ids, token + (before + 1), length)
        id2 = _id_at(ids, token + (before + 2), length)
        d0 = _du_at(grad_y + channel, ring, token + before, grad_y_token, id0, inside, ACTIVATE, RING, BLOCK_C)
        d1 = _du_at(grad_y + channel, ring, token + (before + 1), grad_y_token, id1, inside, ACTIVATE, RING, BLOCK_C)
        d2 = _du_at(grad_y + channel, ring, token + (before + 2), grad_y_token, id2, inside, ACTIVATE, RING, BLOCK_C)
        for step in tl.static_range(WIDTH):
            last = token + (before + 3 + step)
            id3 = _id_at(ids, last, length)
            d3 = _du_at(grad_y + channel, ring, last, grad_y_token, id3, inside, ACTIVATE, RING, BLOCK_C)
            factor = tl.load(taps_here + (WIDTH - 1 - step) * channels, mask=inside, other=0.0).to(tl.float32)
            c0, c1 = _of(d0, own0, id0, ids), _of(d1, own1, id1, ids)
            c2, c3 = _of(d2, own2, id2, ids), _of(d3, own3, id3, ids)
            dx0 += factor * c0
            dx1 += factor * c1
            dx2 += factor * c2
            dx3 += factor * c3
            products = x0 * c0 + x1 * c1 + x2 * c2 + x3 * c3
            total = tl.where(kind == WIDTH - 1 - step, total + products[None, :], total)
            if step == WIDTH - 1 - REACH:
                total = tl.where(kind == WIDTH, total + (c0 + c1 + c2 + c3)[None, :], total)
            d0, d1, d2 = d1, d2, d3
            id0, id1, id2 = id1, id2, id3
        places = grad_x + row * grad_x_row + channel
        _store_grad(places, token, grad_x_token, inside, length, dx0)
        _store_grad(places, token + 1, grad_x_token, inside, length, dx1)
        _store_grad(places, token + 2, grad_x_token, inside, length, dx2)
        _store_grad(places, token + 3, grad_x_token, inside, length, dx3)
    places = sums + (part * SUMS + kind) * channels + channel[None, :]
    tl.store(places, total, mask=inside[None, :])
