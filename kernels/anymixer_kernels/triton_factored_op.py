"""From an op's two device functions to a differentiable op that torch.compile can trace."""

from collections.abc import Callable

import torch
from torch import Tensor

from anymixer_kernels.sequences import starts as starts_of
from anymixer_kernels.triton_common import contiguous_like
from anymixer_kernels.triton_factored import Matrix, dense, fits_one_tile, launch_gradient, launch_product

FactoredMix = Callable[..., Tensor]


def factored_mix(
    name: str, entries: Callable, gradient: Callable, *, sign: float = 1.0, both: bool = False, places: bool = False
) -> FactoredMix:
    """The op `anymixer::<name>`.

    sign: what entries(b, a) is times the transpose of entries(a, b). both: whether `gradient` gives the
    gradient of b as well. places: whether they read where sequences begin.

    The op takes q, k [batch, length, nheads, dims], v [batch, length, nheads, headdim], shift (0-dimensional
    tensor or None), constant (a number that serves where there is no shift), sequence_id [batch, length] or
    None, scale (a number), row_scales ([batch, length] or None) and residual, and returns scale row_scales M V, and
    + V with `residual`, as v.
    """

    def matrix_of(q, k, shift, sequence_id, row_scales, constant, scale) -> Matrix:
        ids = None if sequence_id is None else sequence_id.contiguous()
        starts = starts_of(ids) if places and ids is not None else None
        scales = None if row_scales is None else row_scales.float().contiguous()
        return Matrix(dense(q), dense(k), shift, constant, ids, starts, scales, None, scale)

    @torch.library.custom_op(f"anymixer::{name}", mutates_args=())
    def forward(
        q: Tensor, k: Tensor, v: Tensor, shift: Tensor | None, sequence_id: Tensor | None, row_scales: Tensor | None,
        constant: float, scale: float, residual: bool,
    ) -> Tensor:  # fmt: skip
        y = contiguous_like(v)
        matrix = matrix_of(q, k, shift, sequence_id, row_scales, constant, scale)
        launch_product(entries, matrix, dense(v), y, residual=residual)
        return y

    @forward.register_fake
    def _(q, k, v, shift, sequence_id, row_scales, constant, scale, residual):
        return contiguous_like(v)

    @torch.library.custom_op(f"anymixer::{name}_backward", mutates_args=())
    def backward(
        grad_y: Tensor, q: Tensor, k: Tensor, v: Tensor, shift: Tensor | None, sequence_id: Tensor | None,
        row_scales: Tensor | None, constant: float, scale: float, residual: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        grad_q, grad_k, grad_v = (contiguous_like(t) for t in (q, k, v))
        matrix = matrix_of(q, k, shift, sequence_id, row_scales, constant, scale)
        transposed = matrix.transposed(sign)
        grad_y, v = dense(grad_y), dense(v)
        launch_product(entries, transposed, grad_y, grad_v, residual=residual)
        at_once = both and fits_one_tile(v.shape[1], v.dtype)
        grad_shift = launch_gradient(gradient, matrix, grad_y, v, grad_q, grad_k if at_once else None)
        if not at_once:
            launch_gradient(gradient, transposed, v, grad_y, grad_k, None)
        return grad_q, grad_k, grad_v, v.new_empty(0) if grad_shift is None else grad_shift

    @backward.register_fake
    def _(grad_y, q, k, v, shift, sequence_id, row_scales, constant, scale, residual):
        like = [contiguous_like(t) for t in (q, k, v)]
        of_shift = v.new_empty(0) if shift is None else torch.empty((), dtype=torch.float32, device=v.device)
        return (*like, of_shift)

    def keep(ctx, inputs, output) -> None:
        *tensors, ctx.constant, ctx.scale, ctx.residual = inputs
        ctx.save_for_backward(*tensors)

    def gradients(ctx, grad_y: Tensor):
        q, k, v, shift, sequence_id, row_scales = ctx.saved_tensors
        grad_q, grad_k, grad_v, grad_shift = backward(
            grad_y, q, k, v, shift, sequence_id, row_scales, ctx.constant, ctx.scale, ctx.residual
        )
        of_shift = None if shift is None else grad_shift.to(shift.dtype)
        return grad_q, grad_k, grad_v, of_shift, None, None, None, None, None

    forward.register_autograd(gradients, setup_context=keep)
    return forward
