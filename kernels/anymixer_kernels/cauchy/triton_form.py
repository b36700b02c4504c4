"""Cauchy mixing with the exponentials, the matrix and the product in one kernel."""

import triton
import triton.language as tl
from torch import Tensor

from anymixer_kernels.row_scale import number_and_rows
from anymixer_kernels.triton_factored import column_of
from anymixer_kernels.triton_factored_op import factored_mix

# Exponentials are kept in here, so that a product of two denominators is a float32.
SMALLEST, LARGEST = tl.constexpr(1e-18), tl.constexpr(1e18)


@triton.jit
def _bounded_exp(x):
    return tl.minimum(tl.maximum(tl.exp(x), SMALLEST), LARGEST)


@triton.jit
def _entries(
    a, b, row_begin, col_begin, row_first, col_first, shift,
    DIMS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # An odd last dimension is paired with a term next to 0.
    real = (tl.arange(0, a.shape[1]) < DIMS)[None, :]
    rows = tl.where(real, _bounded_exp(a), LARGEST) + shift
    cols = tl.where(real, _bounded_exp(b), LARGEST)
    m = tl.zeros([a.shape[0], b.shape[0]], tl.float32)
    for pair in range((DIMS + 1) // 2):
        first = column_of(rows, 2 * pair)[:, None] + column_of(cols, 2 * pair)[None, :]
        second = column_of(rows, 2 * pair + 1)[:, None] + column_of(cols, 2 * pair + 1)[None, :]
        # 1 / first + 1 / second with one special function, which is the slowest instruction here: a squared inverse
        # root, because it is one instruction where a quotient is six.
        root = tl.rsqrt(first * second)
        m += (first + second) * (root * root)
    return m


@triton.jit
def _gradient(
    dm, a, b, row_begin, col_begin, row_first, col_first, shift,
    DIMS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a alone."""
    exp_a, cols = _bounded_exp(a), _bounded_exp(b)
    rows = exp_a + shift
    index = tl.arange(0, a.shape[1])
    # Transposed: beside the columns of a tile it would be laid out like one, eight times too wide.
    of_rows = tl.zeros([a.shape[1], a.shape[0]], tl.float32)
    for dim in range(DIMS):
        root = tl.rsqrt(column_of(rows, dim)[:, None] + column_of(cols, dim)[None, :])
        entry = root * root
        total = tl.sum(dm * entry * entry, axis=1)
        of_rows = tl.where(index[:, None] == dim, -total[None, :], of_rows)
    of_rows = tl.trans(of_rows)
    return of_rows * exp_a, tl.zeros_like(b), tl.sum(of_rows, axis=1)


_mix = factored_mix("cauchy", _entries, _gradient)


def cauchy_triton(
    q: Tensor, k: Tensor, v: Tensor, shift: Tensor, sequence_id: Tensor | None, scale: Tensor | float, residual: bool
) -> Tensor:
    """Arguments as in `anymixer_kernels.cauchy.cauchy_mix`."""
    number, rows = number_and_rows(scale)
    return _mix(q, k, v, shift, sequence_id, rows, 0.0, number, residual)
