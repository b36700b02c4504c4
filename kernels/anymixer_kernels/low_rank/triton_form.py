"""Low-rank mixing by tiles of Q K^T, in one kernel with its mask, its scale and the residual."""

import triton
import triton.language as tl
from torch import Tensor

from anymixer_kernels.row_scale import number_and_rows
from anymixer_kernels.triton_factored_op import factored_mix


@triton.jit
def _entries(
    a, b, row_begin, col_begin, row_first, col_first, unused,
    DIMS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    return tl.dot(a.to(DOT), tl.trans(b.to(DOT)), input_precision=PRECISION)


@triton.jit
def _gradient(
    dm, a, b, row_begin, col_begin, row_first, col_first, unused,
    DIMS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    da = tl.dot(dm.to(DOT), b.to(DOT), input_precision=PRECISION)
    db = tl.dot(tl.trans(dm).to(DOT), a.to(DOT), input_precision=PRECISION)
    return da, db, tl.zeros_like(row_first).to(tl.float32)


_mix = factored_mix("low_rank", _entries, _gradient, both=True)


def low_rank_triton(
    q: Tensor, k: Tensor, v: Tensor, sequence_id: Tensor | None, scale: Tensor | float, residual: bool
) -> Tensor:
    """Arguments as in `anymixer_kernels.low_rank.low_rank_mix`."""
    number, rows = number_and_rows(scale)
    return _mix(q, k, v, None, sequence_id, rows, 0.0, number, residual)
