"""The depthwise convolution with its bias and its SiLU in one kernel, and all its gradients in another.

A program is one warp with a block of channels side by side in its threads, and goes through tokens of a row one by one.
What a window covers stays in registers, in tuples that move on by a token at each step: the inputs, and the gradients
of the inputs as far as they are known. So every number is loaded and converted once, sums over tokens stay inside a
thread, and no program reads what another one has written. The loads of a group of tokens come before all that the
group computes and stores, so that many are under way at once.
"""

# Triton's tuples can be added, but not unpacked into others.
# ruff: noqa: RUF005

import triton
import triton.language as tl

from anymixer_kernels.triton_math import sigmoid


@triton.jit
def _inside(token, length, channel, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Whether a token lies in its row, and each channel in the tensor."""
    inside = (token >= 0) & (token < length)
    if CHANNELS % BLOCK_C != 0:
        inside = inside & (channel < CHANNELS)
    return inside


@triton.jit
def _tokens(
    places, first, length, channel,
    COUNT: tl.constexpr, TOKEN: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """COUNT tokens of a row from `first` on, which places points to, TOKEN numbers apart; 0 outside of the row."""
    found = ()
    for i in tl.static_range(COUNT):
        inside = _inside(first + i, length, channel, CHANNELS, BLOCK_C)
        found = found + (tl.load(places + i * TOKEN, mask=inside, other=0.0),)
    return found


@triton.jit
def _ids(ids, first, length, COUNT: tl.constexpr):
    """The sequence ids of COUNT tokens of the row that ids points to; -1 outside of it."""
    found = ()
    for i in tl.static_range(COUNT):
        token = first + i
        found = found + (tl.load(ids + token, mask=(token >= 0) & (token < length), other=-1).to(tl.int32),)
    return found


@triton.jit
def _floats(values, COUNT: tl.constexpr):
    floats = ()
    for i in tl.static_range(COUNT):
        floats = floats + (values[i].to(tl.float32),)
    return floats


@triton.jit
def _zeros(COUNT: tl.constexpr, BLOCK_C: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros = zeros + (tl.zeros([BLOCK_C], tl.float32),)
    return zeros


@triton.jit
def _taps_and_bias(weight, bias, channel, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr):
    """In one tuple, the bias last; weight: [channels, width]."""
    inside = channel < CHANNELS
    found = ()
    for tap in tl.static_range(WIDTH):
        found = found + (tl.load(weight + channel * WIDTH + tap, mask=inside, other=0.0).to(tl.float32),)
    offset = tl.zeros([BLOCK_C], tl.float32)
    if bias is not None:
        offset += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    return found + (offset,)


@triton.jit
def _own_of(near, REACH: tl.constexpr):
    """The id of the token in whose window the ids `near` are; for padding one that no token has."""
    return tl.where(near[REACH] < 0, -2, near[REACH])


@triton.jit
def _seen(window, near, ids, WIDTH: tl.constexpr, REACH: tl.constexpr):
    """The window, 0 in other sequences than its token's, and everywhere for padding."""
    seen = window
    if ids is not None:
        own = _own_of(near, REACH)
        seen = ()
        for tap in tl.static_range(WIDTH):
            seen = seen + (tl.where(near[tap] == own, window[tap], 0.0),)
    return seen


@triton.jit
def _convolve(seen, taps, WIDTH: tl.constexpr):
    u = taps[WIDTH]
    for tap in tl.static_range(WIDTH):
        u += taps[tap] * seen[tap]
    return u


@triton.jit
def forward_kernel(
    x, weight, bias, ids, out, length,
    CHANNELS: tl.constexpr, X_TOKEN: tl.constexpr, OUT_TOKEN: tl.constexpr, WIDTH: tl.constexpr, REACH: tl.constexpr,
    ACTIVATE: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of a row. X_TOKEN, OUT_TOKEN: numbers from a token to the next, also from row to row."""
    blocks: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    channel = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    parts = tl.cdiv(length, TOKENS)
    row = (tl.program_id(0) // blocks // parts).to(tl.int64)
    token = (tl.program_id(0) // blocks % parts) * TOKENS
    taps = _taps_and_bias(weight, bias, channel, CHANNELS, WIDTH, BLOCK_C)
    # The window of the token before the first one.
    behind: tl.constexpr = REACH + 1
    ahead: tl.constexpr = WIDTH - behind
    x_places = x + (row * length + token - behind) * X_TOKEN + channel
    window = _floats(_tokens(x_places, token - behind, length, channel, WIDTH, X_TOKEN, CHANNELS, BLOCK_C), WIDTH)
    x_places += WIDTH * X_TOKEN
    out_places = out + (row * length + token) * OUT_TOKEN + channel
    near = ()
    if ids is not None:
        ids += row * length
        near = _ids(ids, token - behind, length, WIDTH)
    for _ in range(TOKENS // GROUP):
        arriving = _tokens(x_places, token + ahead, length, channel, GROUP, X_TOKEN, CHANNELS, BLOCK_C)
        if ids is not None:
            near = near + _ids(ids, token + ahead, length, GROUP)
        for i in tl.static_range(GROUP):
            window = window[1:] + (arriving[i].to(tl.float32),)
            y = _convolve(_seen(window, near[i + 1 :], ids, WIDTH, REACH), taps, WIDTH)
            if ACTIVATE:
                y = y * sigmoid(y)
            if ids is not None:
                y = tl.where(near[i + behind] >= 0, y, 0.0)
            inside = _inside(token + i, length, channel, CHANNELS, BLOCK_C)
            tl.store(out_places + i * OUT_TOKEN, y.to(out.dtype.element_ty), mask=inside)
        if ids is not None:
            near = near[GROUP:]
        token += GROUP
        x_places += GROUP * X_TOKEN
        out_places += GROUP * OUT_TOKEN


@triton.jit
def _step(
    window, near, partial, total, taps, grad, ids, counts,
    WIDTH: tl.constexpr, REACH: tl.constexpr, ACTIVATE: tl.constexpr,
):  # fmt: skip
    """partial and total with what `grad`, the gradient of one token's output, gives.

    window and near: the inputs and ids around the token; partial: the gradients of these inputs; total: those of the
    taps and, last, of the bias, to which the token adds if it `counts`.
    """
    du = grad.to(tl.float32)
    seen = _seen(window, near, ids, WIDTH, REACH)
    if ACTIVATE:
        u = _convolve(seen, taps, WIDTH)
        gate = sigmoid(u)
        du = du * (gate + u * gate * (1.0 - gate))
    if ids is not None:
        du = tl.where(near[REACH] >= 0, du, 0.0)
    counted = du
    if counts is not None:
        counted = tl.where(counts, du, 0.0)
    of_inputs, of_taps = (), ()
    for tap in tl.static_range(WIDTH):
        factor = taps[tap]
        if ids is not None:
            factor = tl.where(near[tap] == _own_of(near, REACH), factor, 0.0)
        of_inputs = of_inputs + (partial[tap] + factor * du,)
        of_taps = of_taps + (total[tap] + counted * seen[tap],)
    return of_inputs, of_taps + (total[WIDTH] + counted,)


@triton.jit
def _steps(
    window, partial, total, taps, arriving, grads, ids, counts, token, length, channel, out_places,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, REACH: tl.constexpr, ACTIVATE: tl.constexpr, OUT_TOKEN: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """COUNT steps, of which the first completes the gradient of the input `token`; stored where out_places points to.

    arriving: the last input of each step's window; grads: of the outputs, which are REACH tokens ahead.
    """
    near = ()
    if ids is not None:
        near = _ids(ids, token, length, COUNT + WIDTH - 1)
    for i in tl.static_range(COUNT):
        window = window[1:] + (arriving[i].to(tl.float32),)
        partial = partial[1:] + (tl.zeros([BLOCK_C], tl.float32),)
        partial, total = _step(
            window, near[i:], partial, total, taps, grads[i], ids, counts, WIDTH, REACH, ACTIVATE
        )  # fmt: skip
        if out_places is not None:
            inside = _inside(token + i, length, channel, CHANNELS, BLOCK_C)
            tl.store(out_places + i * OUT_TOKEN, partial[0].to(out_places.dtype.element_ty), mask=inside)
    return window, partial, total


@triton.jit
def _walk(
    window, partial, total, taps, x_places, grad_places, ids, counts, token, length, channel, out_places,
    STEPS: tl.constexpr, WIDTH: tl.constexpr, REACH: tl.constexpr, ACTIVATE: tl.constexpr, X_TOKEN: tl.constexpr,
    GRAD_TOKEN: tl.constexpr, OUT_TOKEN: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """STEPS steps, each with loads of its own: little code and few registers, for what happens seldom."""
    for i in range(STEPS):
        at = token + i
        arriving = _tokens(x_places + i * X_TOKEN, at + WIDTH - 1, length, channel, 1, X_TOKEN, CHANNELS, BLOCK_C)
        grads = _tokens(grad_places + i * GRAD_TOKEN, at + REACH, length, channel, 1, GRAD_TOKEN, CHANNELS, BLOCK_C)
        places = None
        if out_places is not None:
            places = out_places + i * OUT_TOKEN
        window, partial, total = _steps(
            window, partial, total, taps, arriving, grads, ids, counts, at, length, channel, places,
            1, WIDTH, REACH, ACTIVATE, OUT_TOKEN, CHANNELS, BLOCK_C,
        )  # fmt: skip
    return window, partial, total


@triton.jit
def _one_sequence(ids, first, length, COUNT: tl.constexpr, BLOCK_T: tl.constexpr):
    """Whether those of COUNT tokens from `first` on that lie in the row are of one sequence, none of them padding."""
    token = first + tl.minimum(tl.arange(0, BLOCK_T), COUNT - 1)
    token = tl.maximum(tl.minimum(token, length - 1), 0)
    found = tl.load(ids + token, mask=token < length, other=-1).to(tl.int32)
    largest = tl.max(found, 0)
    return (largest >= 0) & (largest == tl.min(found, 0))


@triton.jit
def backward_kernel(
    grad_y, x, weight, bias, ids, grad_x, sums_of_taps, sums_of_bias, batch, length,
    CHANNELS: tl.constexpr, GRAD_Y_TOKEN: tl.constexpr, X_TOKEN: tl.constexpr, GRAD_X_TOKEN: tl.constexpr,
    WIDTH: tl.constexpr, REACH: tl.constexpr, ACTIVATE: tl.constexpr, LEAD: tl.constexpr, PARTS: tl.constexpr,
    TOKENS: tl.constexpr, GROUP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """PARTS parts, each TOKENS tokens of a row. LEAD: how many tokens before a part have it in their windows; 0 where a
    part is a row. BLOCK_T: a power of two, at least GROUP + WIDTH - 1.

    sums_of_taps: [programs / blocks, channels, width]; sums_of_bias: [programs / blocks, channels], or None.
    """
    blocks: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    channel = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    program = (tl.program_id(0) // blocks).to(tl.int64)
    taps = _taps_and_bias(weight, bias, channel, CHANNELS, WIDTH, BLOCK_C)
    total = _zeros(WIDTH + 1, BLOCK_C)
    per_row = tl.cdiv(length, TOKENS)
    # Steps before the first that completes a gradient of the part, and the inputs that the first step finds loaded.
    early: tl.constexpr = LEAD + REACH
    known: tl.constexpr = WIDTH - 1
    for turn in range(PARTS):
        part = program * PARTS + turn
        row = part // per_row
        first = (part % per_row).to(tl.int32) * TOKENS
        limit = tl.where(row < batch, length, 0)
        row_ids = None
        if ids is not None:
            row_ids = ids + row * length
        token = first - early
        x_places = x + (row * length + token) * X_TOKEN + channel
        grad_places = grad_y + (row * length + token + REACH) * GRAD_Y_TOKEN + channel
        before = _tokens(x_places, token, limit, channel, known, X_TOKEN, CHANNELS, BLOCK_C)
        window = (tl.zeros([BLOCK_C], tl.float32),) + _floats(before, known)
        x_places += known * X_TOKEN
        # These count in the part before, if there is one.
        window, partial, total = _walk(
            window, _zeros(WIDTH, BLOCK_C), total, taps, x_places, grad_places, row_ids, first == 0, token, limit,
            channel, None, early, WIDTH, REACH, ACTIVATE, X_TOKEN, GRAD_Y_TOKEN, GRAD_X_TOKEN, CHANNELS, BLOCK_C,
        )  # fmt: skip
        token = first
        x_places += early * X_TOKEN
        grad_places += early * GRAD_Y_TOKEN
        out_places = grad_x + (row * length + first) * GRAD_X_TOKEN + channel
        for _ in range(TOKENS // GROUP):
            arriving = _tokens(x_places, token + known, limit, channel, GROUP, X_TOKEN, CHANNELS, BLOCK_C)
            grads = _tokens(grad_places, token + REACH, limit, channel, GROUP, GRAD_Y_TOKEN, CHANNELS, BLOCK_C)
            if ids is None:
                window, partial, total = _steps(
                    window, partial, total, taps, arriving, grads, None, None, token, limit, channel, out_places,
                    GROUP, WIDTH, REACH, ACTIVATE, GRAD_X_TOKEN, CHANNELS, BLOCK_C,
                )  # fmt: skip
            else:
                if _one_sequence(row_ids, token, limit, GROUP + known, BLOCK_T):
                    window, partial, total = _steps(
                        window, partial, total, taps, arriving, grads, None, None, token, limit, channel, out_places,
                        GROUP, WIDTH, REACH, ACTIVATE, GRAD_X_TOKEN, CHANNELS, BLOCK_C,
                    )  # fmt: skip
                else:
                    window, partial, total = _walk(
                        window, partial, total, taps, x_places, grad_places, row_ids, None, token, limit, channel,
                        out_places, GROUP, WIDTH, REACH, ACTIVATE, X_TOKEN, GRAD_Y_TOKEN, GRAD_X_TOKEN, CHANNELS,
                        BLOCK_C,
                    )  # fmt: skip
            token += GROUP
            x_places += GROUP * X_TOKEN
            grad_places += GROUP * GRAD_Y_TOKEN
            out_places += GROUP * GRAD_X_TOKEN
    inside = channel < CHANNELS
    for tap in tl.static_range(WIDTH):
        tl.store(sums_of_taps + (program * CHANNELS + channel) * WIDTH + tap, total[tap], mask=inside)
    if sums_of_bias is not None:
        tl.store(sums_of_bias + program * CHANNELS + channel, total[WIDTH], mask=inside)
