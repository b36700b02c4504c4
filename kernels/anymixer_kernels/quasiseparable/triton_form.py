"""The Triton form of quasiseparable mixing: the launches of one forward and one backward pass, and the op.

A row of at most CHUNK tokens is one chunk. In longer rows each chunk's product is joined by what its tokens meet of
other chunks, through states that are gathered and carried on beforehand (as in arXiv 2405.21060, section 6).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from anymixer_kernels.quasiseparable.limits import CHUNK
from anymixer_kernels.quasiseparable.reference import QuasiseparableInputs
from anymixer_kernels.quasiseparable.triton_gradients import Gradients, blocks_of_chunk, launch_gradients
from anymixer_kernels.quasiseparable.triton_log_weights import LogWeights, Steps, log_weights, log_weights_backward
from anymixer_kernels.quasiseparable.triton_mix import launch_mix
from anymixer_kernels.quasiseparable.triton_states import carry_states, gather_states
from anymixer_kernels.quasiseparable.triton_tiles import Side
from anymixer_kernels.triton_common import block_of


@dataclass(frozen=True)
class Operands:
    """x: [batch, length, nheads, headdim]; B, C: (forward, backward), [batch, length, ngroups, d_state], all of the
    same strides; diagonal: [batch, length, nheads] or None. Every last axis has stride 1."""

    x: Tensor
    B: tuple[Tensor, Tensor]
    C: tuple[Tensor, Tensor]
    steps: Steps
    diagonal: Tensor | None

    def sources(self, weights: LogWeights) -> Side:
        """The side that is mixed."""
        return Side(self.x, *self.B, weights.col)

    def readers(self, weights: LogWeights, grad_y: Tensor | None) -> Side:
        """The side that is written, with the gradient of what it holds."""
        return Side(grad_y, *self.C, weights.row)


@dataclass(frozen=True)
class OperandGrads:
    """Where gradients are written: x, B and C strided like operands may be; steps: (forward, backward), of the same
    strides; diagonal: float32 [batch, length, nheads], contiguous."""

    x: Tensor
    B: tuple[Tensor, Tensor]
    C: tuple[Tensor, Tensor]
    steps: tuple[Tensor, Tensor]
    diagonal: Tensor | None


def mix(operands: Operands, out: Tensor) -> Tensor | None:
    """Write Y into `out`, like x. Returns the states that enter each chunk, None where a row is one chunk."""
    ids = operands.steps.sequence_id
    weights = log_weights(operands.steps, _chunk(operands.x))
    sources, readers, states = operands.sources(weights), operands.readers(weights, None), None
    if weights.nchunks > 1:
        states = gather_states(sources, weights, ids, readers=False)
        carry_states(states, weights, ids, operands.x.shape[1])
    launch_mix(readers, sources, weights, ids, out, readers=True, diagonal=operands.diagonal, states=states)
    return states


@dataclass(frozen=True)
class ThroughMatrix:
    """What the gradients through M's entries leave. A, bias: the gradients of A and of the steps' bias, float32
    [nheads]; asked: what is asked of the states that leave each chunk, None where a row is one chunk."""

    A: Tensor
    bias: Tensor
    asked: Tensor | None


@dataclass(frozen=True)
class MixBackward:
    """One backward pass: first `through_matrix`, then `of_x`, which may write where x stands.

    states: what `mix` returned. grad_y: like x, last axis of stride 1.
    """

    operands: Operands
    states: Tensor | None
    grad_y: Tensor
    weights: LogWeights

    @classmethod
    def of(cls, operands: Operands, states: Tensor | None, grad_y: Tensor) -> "MixBackward":
        """The pass, its log weights computed."""
        return cls(operands, states, grad_y, log_weights(operands.steps, _chunk(operands.x)))

    def through_matrix(self, grads: "OperandGrads") -> ThroughMatrix:
        """Write what `grads` names, less x's."""
        weights, ids, of_total, leaving, asked = self.weights, self.operands.steps.sequence_id, None, None, None
        sources, readers = self._sides()
        logs = torch.empty_like(weights.row), torch.empty_like(weights.col)
        if self.states is not None:
            blocks = blocks_of_chunk(weights.chunk)
            asked = gather_states(readers, weights, ids, readers=True)
            of_total = carry_states(asked, weights, ids, self.operands.x.shape[1], self.states, spare=blocks)
            assert of_total is not None
            leaving = of_total[..., -blocks:]
        launch_gradients(
            readers, sources, weights, ids, Gradients(*grads.C, logs[0]), readers=True,
            grad_diagonal=grads.diagonal, states=self.states,
        )  # fmt: skip
        launch_gradients(
            sources, readers, weights, ids, Gradients(*grads.B, logs[1], leaving), readers=False, states=asked
        )
        of_total = None if of_total is None else of_total.sum(-1)
        return ThroughMatrix(*log_weights_backward(self.operands.steps, weights, logs, of_total, grads.steps), asked)

    def of_x(self, grads: "OperandGrads", asked: Tensor | None, extra: tuple[Tensor, Tensor] | None = None) -> None:
        """Write the gradient of x, with the product of `extra` added; asked: as `through_matrix` returned it."""
        sources, readers = self._sides()
        launch_mix(
            sources, readers, self.weights, self.operands.steps.sequence_id, grads.x, readers=False,
            diagonal=self.operands.diagonal, extra=extra, states=asked,
        )  # fmt: skip

    def _sides(self) -> tuple[Side, Side]:
        return self.operands.sources(self.weights), self.operands.readers(self.weights, self.grad_y)


def _chunk(x: Tensor) -> int:
    return min(CHUNK, block_of(x.shape[1]))


def quasiseparable_triton(inputs: QuasiseparableInputs) -> Tensor:
    """Y = M X as [batch, length, nheads, headdim] in x's dtype."""
    B, C = (tuple(t.to(inputs.x.dtype) for t in pair) for pair in (inputs.B, inputs.C))
    y, _ = _forward(inputs.x, *inputs.dt, inputs.A.float(), B[0], B[1], C[0], C[1], inputs.diagonal, inputs.sequence_id)
    return y


@torch.library.custom_op("anymixer::quasiseparable", mutates_args=())
def _forward(
    x: Tensor, dt_f: Tensor, dt_b: Tensor, A: Tensor, B_f: Tensor, B_b: Tensor, C_f: Tensor, C_b: Tensor,
    diagonal: Tensor | None, sequence_id: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    operands = _operands(x, dt_f, dt_b, A, B_f, B_b, C_f, C_b, diagonal, sequence_id)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    states = mix(operands, y)
    return y, x.new_empty(0) if states is None else states


@_forward.register_fake
def _(x, dt_f, dt_b, A, B_f, B_b, C_f, C_b, diagonal, sequence_id):
    batch, length, nheads, headdim = x.shape
    chunks = -(-length // CHUNK)
    states = x.new_empty(2, batch, chunks, nheads, headdim, B_f.shape[-1]) if length > CHUNK else x.new_empty(0)
    return x.new_empty(x.shape), states


@torch.library.custom_op("anymixer::quasiseparable_backward", mutates_args=())
def _backward(
    grad_y: Tensor, x: Tensor, dt_f: Tensor, dt_b: Tensor, A: Tensor,
    B_f: Tensor, B_b: Tensor, C_f: Tensor, C_b: Tensor,
    diagonal: Tensor | None, sequence_id: Tensor | None, states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    operands = _operands(x, dt_f, dt_b, A, B_f, B_b, C_f, C_b, diagonal, sequence_id)
    grad_x, grad_dt_f, grad_dt_b, *projections = (
        torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt_f, dt_b, B_f, B_b, C_f, C_b)
    )
    grad_B_f, grad_B_b, grad_C_f, grad_C_b = projections
    grad_diagonal = A.new_empty(0 if diagonal is None else diagonal.shape)
    grads = OperandGrads(
        grad_x, (grad_B_f, grad_B_b), (grad_C_f, grad_C_b), (grad_dt_f, grad_dt_b),
        None if diagonal is None else grad_diagonal,
    )  # fmt: skip
    grad_y = grad_y if grad_y.stride(-1) == 1 else grad_y.contiguous()
    backward = MixBackward.of(operands, states if states.numel() else None, grad_y)
    through = backward.through_matrix(grads)
    backward.of_x(grads, through.asked)
    return grad_x, grad_dt_f, grad_dt_b, through.A, grad_B_f, grad_B_b, grad_C_f, grad_C_b, grad_diagonal


@_backward.register_fake
def _(grad_y, x, dt_f, dt_b, A, B_f, B_b, C_f, C_b, diagonal, sequence_id, states):
    like = [t.new_empty(t.shape) for t in (x, dt_f, dt_b, A, B_f, B_b, C_f, C_b)]
    return (*like, A.new_empty(0 if diagonal is None else diagonal.shape))


def _operands(x, dt_f, dt_b, A, B_f, B_b, C_f, C_b, diagonal, sequence_id) -> Operands:
    B_f, B_b, C_f, C_b = _aligned(B_f, B_b, C_f, C_b)
    dt_f, dt_b = _aligned(dt_f, dt_b)
    (x,) = _aligned(x)
    ids = None if sequence_id is None else sequence_id.contiguous()
    if diagonal is not None:
        (diagonal,) = _aligned(diagonal)
    return Operands(x, (B_f, B_b), (C_f, C_b), Steps(dt_f, dt_b, A, None, ids), diagonal)


def _aligned(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors if they have the same strides, the last 1; else contiguous copies."""
    strides = tensors[0].stride()
    if strides[-1] == 1 and all(t.stride() == strides for t in tensors):
        return tensors
    return tuple(t.contiguous() for t in tensors)


def _keep_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _gradients(ctx, grad_y: Tensor, _: Tensor):
    *inputs, states = ctx.saved_tensors
    *grads, grad_diagonal = _backward(grad_y, *inputs, states)
    diagonal = inputs[8]
    return (*grads, None if diagonal is None else grad_diagonal.to(diagonal.dtype), None)


_forward.register_autograd(_gradients, setup_context=_keep_for_backward)
