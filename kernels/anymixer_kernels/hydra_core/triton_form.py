"""Hydra's core as one Triton op.

Gradients are written side by side where the input projection wants them, and that of x over x itself.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from anymixer_kernels.depthwise_conv.triton_form import launch_conv, launch_conv_backward
from anymixer_kernels.gated_norm.triton_form import launch_gated_norm, launch_gated_norm_backward
from anymixer_kernels.hydra_core.parts import HydraParameters
from anymixer_kernels.quasiseparable.triton_form import CHUNK, MixBackward, OperandGrads, Operands, mix
from anymixer_kernels.quasiseparable.triton_log_weights import Steps


def hydra_core_triton(projected: Tensor, parameters: HydraParameters, sequence_id: Tensor | None) -> Tensor:
    """Arguments as in `hydra_core`."""
    fc_D = None if parameters.fc_D is None else parameters.fc_D.weight
    out, *_ = _forward(
        projected, parameters.conv_weight, parameters.conv_bias, parameters.dt_bias, parameters.A.float(), parameters.D,
        fc_D, parameters.norm_weight, sequence_id,
        parameters.headdim, parameters.d_state, parameters.ngroups, parameters.eps,
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class _Layout:
    """Where everything stands in the last axis of `projected` and of the convolution's output."""

    nheads: int
    headdim: int
    ngroups: int
    d_state: int

    @property
    def d_inner(self) -> int:
        return self.nheads * self.headdim

    @property
    def conv_width(self) -> int:
        return self.d_inner + 4 * self.ngroups * self.d_state

    def gate(self, projected: Tensor) -> Tensor:
        return projected[..., : self.d_inner]

    def convolved(self, projected: Tensor) -> Tensor:
        return projected[..., self.d_inner : self.d_inner + self.conv_width]

    def steps(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Of both directions: [batch, length, nheads] each."""
        first = self.d_inner + self.conv_width
        return projected[..., first : first + self.nheads], projected[..., first + self.nheads :]

    def x(self, mixed: Tensor) -> Tensor:
        return mixed[..., : self.d_inner].unflatten(-1, (self.nheads, self.headdim))

    def projections(self, mixed: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """B and C, (forward, backward) each: [batch, length, ngroups, d_state]; what stands before them is left out."""
        parts = mixed[..., -4 * self.ngroups * self.d_state :].unflatten(-1, (4, self.ngroups, self.d_state))
        B_f, C_f, B_b, C_b = parts.unbind(-3)
        return (B_f, B_b), (C_f, C_b)


def _convolved(
    projected: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, sequence_id: Tensor | None, layout: _Layout
) -> Tensor:
    """Most of what the mixing reads. Not kept for the backward pass, where it would be half as large as `projected`."""
    mixed = projected.new_empty(*projected.shape[:2], layout.conv_width)
    launch_conv(layout.convolved(projected), conv_weight, conv_bias, sequence_id, mixed, activate=True, causal=False)
    return mixed


def _operands(
    mixed: Tensor, diagonal: Tensor | None, projected: Tensor, dt_bias: Tensor, A: Tensor, sequence_id: Tensor | None,
    layout: _Layout,
) -> Operands:  # fmt: skip
    steps = Steps(*layout.steps(projected), A, dt_bias.float(), sequence_id)
    return Operands(layout.x(mixed), *layout.projections(mixed), steps, diagonal)


@torch.library.custom_op("anymixer::hydra_core", mutates_args=())
def _forward(
    projected: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, dt_bias: Tensor, A: Tensor, D: Tensor | None,
    fc_D: Tensor | None, norm_weight: Tensor, sequence_id: Tensor | None,
    headdim: int, d_state: int, ngroups: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The output; and kept for the backward pass: what comes before the norm, the states that chunks begin with, and
    the diagonal. The last two are empty where there are none."""
    layout = _Layout(dt_bias.shape[0], headdim, ngroups, d_state)
    ids = None if sequence_id is None else sequence_id.contiguous()
    projected = projected.contiguous()
    mixed = _convolved(projected, conv_weight, conv_bias, ids, layout)
    diagonal = None
    if D is not None and fc_D is not None:
        flat = mixed.flatten(0, 1)[:, : layout.d_inner]
        diagonal = torch.addmm(D.to(mixed.dtype), flat, fc_D.to(mixed.dtype).T).view(*mixed.shape[:2], layout.nheads)
    operands = _operands(mixed, diagonal, projected, dt_bias, A, ids, layout)
    y = projected.new_empty(*projected.shape[:2], layout.d_inner)
    states = mix(operands, y.unflatten(-1, (layout.nheads, headdim)))
    out = torch.empty_like(y)
    launch_gated_norm(y, layout.gate(projected), norm_weight, eps, out)
    kept = (projected.new_empty(0) if tensor is None else tensor for tensor in (states, diagonal))
    return out, y, *kept


@_forward.register_fake
def _(projected, conv_weight, conv_bias, dt_bias, A, D, fc_D, norm_weight, sequence_id, headdim, d_state, ngroups, eps):
    batch, length, _ = projected.shape
    nheads, chunks = dt_bias.shape[0], -(-length // CHUNK)
    y = projected.new_empty(batch, length, nheads * headdim)
    shape = (2, batch, chunks, nheads, headdim, d_state) if length > CHUNK else (0,)
    diagonal = projected.new_empty((0,) if fc_D is None else (batch, length, nheads))
    return torch.empty_like(y), y, projected.new_empty(shape), diagonal


def _mixing_backward(
    operands: Operands, mixed: Tensor, states: Tensor | None, D: Tensor | None, fc_D: Tensor | None, spare: Tensor,
    grad_steps: tuple[Tensor, Tensor], layout: _Layout,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Write the gradient of `mixed`, of which the operands are made, over it, and `grad_steps`; return those of A, of
    the steps' bias, of D and of fc_D (empty where there are none). spare: laid out like `mixed`; it holds dY, and then
    the gradients of B and C, which are read to the end. What is needed here alone is freed on return."""
    A, x = operands.steps.A, mixed[..., : layout.d_inner]
    grad_diagonal = None if operands.diagonal is None else A.new_empty(*mixed.shape[:2], layout.nheads)
    into = OperandGrads(operands.x, *layout.projections(spare), grad_steps, grad_diagonal)
    backward = MixBackward.of(operands, states, layout.x(spare))
    through = backward.through_matrix(into)
    grad_D, grad_fc_D, extra = A.new_empty(0), A.new_empty(0), None
    if grad_diagonal is not None and fc_D is not None and D is not None:
        grad_D = grad_diagonal.sum((0, 1)).to(D.dtype)
        narrow = grad_diagonal.flatten(0, 1).to(mixed.dtype)
        grad_fc_D = (narrow.T @ x.flatten(0, 1)).to(fc_D.dtype)
        extra = grad_diagonal, fc_D.to(mixed.dtype).contiguous()
    backward.of_x(into, through.asked, extra)
    mixed[..., layout.d_inner :] = spare[..., layout.d_inner :]
    return through.A, through.bias, grad_D, grad_fc_D


@torch.library.custom_op("anymixer::hydra_core_backward", mutates_args=())
def _backward(
    grad_out: Tensor, projected: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, dt_bias: Tensor, A: Tensor,
    D: Tensor | None, fc_D: Tensor | None, norm_weight: Tensor, sequence_id: Tensor | None, y: Tensor, states: Tensor,
    diagonal: Tensor, headdim: int, d_state: int, ngroups: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    layout = _Layout(dt_bias.shape[0], headdim, ngroups, d_state)
    ids = None if sequence_id is None else sequence_id.contiguous()
    projected, grad_out = projected.contiguous(), grad_out.contiguous()
    grad_projected = torch.empty_like(projected)
    # The convolution writes here when all else is done; until then the mixing's gradients stand there.
    spare = layout.convolved(grad_projected)
    grad_norm = launch_gated_norm_backward(
        grad_out, y, layout.gate(projected), norm_weight, eps, spare[..., : layout.d_inner], layout.gate(grad_projected)
    )
    mixed = _convolved(projected, conv_weight, conv_bias, ids, layout)
    operands = _operands(mixed, diagonal if diagonal.numel() else None, projected, dt_bias, A, ids, layout)
    grads = _mixing_backward(
        operands, mixed, states if states.numel() else None, D, fc_D, spare, layout.steps(grad_projected), layout
    )
    grad_A, grad_dt_bias, grad_D, grad_fc_D = grads
    grad_weight, grad_bias = launch_conv_backward(
        mixed, layout.convolved(projected), conv_weight, conv_bias, ids, layout.convolved(grad_projected),
        activate=True, causal=False,
    )  # fmt: skip
    grad_bias = A.new_empty(0) if grad_bias is None else grad_bias
    return grad_projected, grad_weight, grad_bias, grad_dt_bias, grad_A, grad_D, grad_fc_D, grad_norm


@_backward.register_fake
def _(grad_out, projected, conv_weight, conv_bias, dt_bias, A, D, fc_D, norm_weight, sequence_id, y, states, diagonal,
      headdim, d_state, ngroups, eps):  # fmt: skip
    parameters = (conv_weight, conv_bias, dt_bias.float(), A, D, fc_D, norm_weight)
    return (torch.empty_like(projected), *(A.new_empty(0) if p is None else torch.empty_like(p) for p in parameters))


def _keep_for_backward(ctx, inputs, output) -> None:
    _, *kept = output
    *tensors, ctx.headdim, ctx.d_state, ctx.ngroups, ctx.eps = inputs
    ctx.save_for_backward(*tensors, *kept)
    # Else a tensor of zeros, as large as the output, is written for what is kept.
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_out: Tensor | None, *_):
    if grad_out is None:
        return (None,) * 13
    tensors = ctx.saved_tensors
    grads = _backward(grad_out, *tensors, ctx.headdim, ctx.d_state, ctx.ngroups, ctx.eps)
    parameters = tensors[1:8]
    kept = [None if p is None else grad.to(p.dtype) for p, grad in zip(parameters, grads[1:])]
    return (grads[0], *kept, None, None, None, None, None)


_forward.register_autograd(_gradients, setup_context=_keep_for_backward)
