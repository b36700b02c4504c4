"""Vandermonde mixing with the cosines, the matrix and the product in one kernel.

A place of the first quarter of a tile brings one sine and cosine, from which the addition theorem makes those of its
fellows in the other quarters. Sums are of 1 - cos, which keeps its digits where angles are small; the ones cancel
between rows and columns.
"""

import triton
import triton.language as tl
from torch import Tensor

from anymixer_kernels.row_scale import number_and_rows
from anymixer_kernels.triton_factored import column_of
from anymixer_kernels.triton_factored_op import factored_mix


@triton.jit
def _sine_and_versine(turns, DOT: tl.constexpr):
    """sin x and 1 - cos x of x = 2 pi turns."""
    # Adding 1.5 * 2**23 rounds to an integer.
    half = (turns - ((turns + 12582912.0) - 12582912.0)) * 3.141592653589793
    if tl.float32 == DOT:
        sine, cosine = tl.sin(half), tl.cos(half)
    else:
        sine = tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=f,f", [half], tl.float32, True, 1)
        cosine = tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=f,f", [half], tl.float32, True, 1)
    twice = 2.0 * sine
    return twice * cosine, twice * sine


@triton.jit
def _quarters_ahead(turns, DOT: tl.constexpr):
    """Cosine and sine of 1, 2 and 3 times `turns`."""
    s1, v1 = _sine_and_versine(turns, DOT)
    c1, c2 = 1.0 - v1, 1.0 - 2.0 * s1 * s1
    s2 = 2.0 * s1 * c1
    return c1, s1, c2, s2, c1 * c2 - s1 * s2, s1 * c2 + c1 * s2


@triton.jit
def _first_quarter(begin, first, WIDTH: tl.constexpr):
    """The first fourth of WIDTH places from `begin` on, counted from where the sequences begin: [tokens, WIDTH / 4]."""
    place = tl.arange(0, WIDTH // 4)[None, :] + (begin - first)[:, None]
    return place.to(tl.float32)


@triton.jit
def _versine_sums(turns, begin, first, DIMS: tl.constexpr, WIDTH: tl.constexpr, DOT: tl.constexpr):
    """sum_d 1 - cos(2 pi turns[t,d] n) for WIDTH places n from `begin` on: [tokens, WIDTH]."""
    place = _first_quarter(begin, first, WIDTH)
    zeros, none = tl.zeros_like(place), tl.zeros([turns.shape[0]], tl.float32)
    m0, m1, m2, m3 = zeros, zeros, zeros, zeros
    rest1, rest2, rest3 = none, none, none
    for dim in range(DIMS):
        turn = column_of(turns, dim)
        sine, versine = _sine_and_versine(turn[:, None] * place, DOT)
        c1, s1, c2, s2, c3, s3 = _quarters_ahead(turn * (WIDTH // 4), DOT)
        # 1 - cos(x + y) = cos y (1 - cos x) + sin y sin x + (1 - cos y), the last of which is a row's alone.
        m0 += versine
        m1 += versine * c1[:, None]
        m1 += sine * s1[:, None]
        m2 += versine * c2[:, None]
        m2 += sine * s2[:, None]
        m3 += versine * c3[:, None]
        m3 += sine * s3[:, None]
        rest1 += 1.0 - c1
        rest2 += 1.0 - c2
        rest3 += 1.0 - c3
    even = tl.join(m0, m2 + rest2[:, None])
    odd = tl.join(m1 + rest1[:, None], m3 + rest3[:, None])
    return tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 3, 1)), [turns.shape[0], WIDTH])


@triton.jit
def _entries(
    a, b, row_begin, col_begin, row_first, col_first, frequency,
    DIMS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    of_rows = _versine_sums(a * frequency, col_begin, row_first, DIMS, b.shape[0], DOT)
    of_cols = _versine_sums(b * frequency, row_begin, col_first, DIMS, a.shape[0], DOT)
    return tl.trans(of_cols) - of_rows


@triton.jit
def _gradient(
    dm, a, b, row_begin, col_begin, row_first, col_first, frequency,
    DIMS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """of a alone: dM/da[t,d] = -2 pi frequency l sin(2 pi frequency a[t,d] l)."""
    ROWS: tl.constexpr = a.shape[0]
    COLS: tl.constexpr = b.shape[0]
    place = _first_quarter(col_begin, row_first, COLS)
    even, odd = tl.split(tl.permute(tl.reshape(dm, [ROWS, 2, 2, COLS // 4]), (0, 3, 1, 2)))
    g0, g2 = tl.split(even)
    g1, g3 = tl.split(odd)
    step: tl.constexpr = COLS // 4
    g0, g1, g2, g3 = g0 * place, g1 * (place + step), g2 * (place + 2 * step), g3 * (place + 3 * step)
    turns = a * frequency
    index = tl.arange(0, a.shape[1])
    of_rows = tl.zeros([a.shape[1], ROWS], tl.float32)
    for dim in range(DIMS):
        turn = column_of(turns, dim)
        sine, versine = _sine_and_versine(turn[:, None] * place, DOT)
        c1, s1, c2, s2, c3, s3 = _quarters_ahead(turn * step, DOT)
        by_sine = g0 + g1 * c1[:, None] + g2 * c2[:, None] + g3 * c3[:, None]
        by_cosine = g1 * s1[:, None] + g2 * s2[:, None] + g3 * s3[:, None]
        total = tl.sum(sine * by_sine + (1.0 - versine) * by_cosine, axis=1)
        of_rows = tl.where(index[:, None] == dim, total[None, :], of_rows)
    of_rows = tl.trans(of_rows) * (-6.283185307179586 * frequency)
    return of_rows, tl.zeros_like(b), tl.zeros_like(row_first).to(tl.float32)


_mix = factored_mix("vandermonde", _entries, _gradient, sign=-1.0, places=True)


def vandermonde_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    frequency: float,
    sequence_id: Tensor | None,
    scale: Tensor | float,
    residual: bool,
) -> Tensor:
    """Arguments as in `anymixer_kernels.vandermonde.vandermonde_mix`."""
    number, rows = number_and_rows(scale)
    return _mix(q, k, v, None, sequence_id, rows, frequency, number, residual)
