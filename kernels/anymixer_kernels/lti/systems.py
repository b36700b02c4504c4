"""Linear systems x_t = A x_{t-1} + B u_t, y_t = C x_t, one a channel, in real arithmetic.

A state is a row of `width` real numbers a channel. Powers of A come as two tables of about sqrt(length) rows, whose
product is the kernel (the addition theorem of exponents): no table has an entry for every state and every lag.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from anymixer_kernels.blockwise import wide

# Whose float32 products may be TF32's, with 11 bits (Composer allows it). Of a kernel two digits would be left, as its
# powers compound what they are rounded by; products with tokens are as near as those of any linear layer.
ROUNDING_DEVICES = ("cuda",)


def exact(tensor: Tensor) -> Tensor:
    """A factor of a product that is to be float32's or better: in float64 on `ROUNDING_DEVICES`, else as it is."""
    return tensor.double() if tensor.device.type in ROUNDING_DEVICES else tensor


def exact_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, in left's dtype."""
    return (exact(left) @ exact(right)).to(left.dtype)


class StateSpace(Protocol):
    """What the forms of `anymixer_kernels.lti` ask of a system."""

    @property
    def width(self) -> int:
        """Real numbers in a channel's state."""
        ...

    def init_state(self, batch: int) -> Tensor:
        """Zeros, [batch, channels, width]."""
        ...

    def kernel(self, length: int) -> Tensor:
        """C A^l B for l = 0 .. length-1: [channels, length]."""
        ...

    def gathers(self, size: int) -> Tensor:
        """A^l B for l = 0 .. size-1: [channels, size, width]."""
        ...

    def reads(self, size: int) -> Tensor:
        """C A^l for l = 0 .. size-1: [channels, size, width]."""
        ...

    def advance(self, steps: int) -> Callable[[Tensor], Tensor]:
        """The map of states [..., channels, width] by A^steps."""
        ...

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One token: u [batch, channels] -> y in u's dtype, and the new state."""
        ...


@dataclass(frozen=True)
class DiagonalSystem:
    """A diagonal, B = 1: K_l = Re sum_n weight_n exp(l (log_decay_n + i angle_n)).

    log_decay, weight: [channels, modes], float32 or wider. angle, weight_im: the same, or both None for real modes.
    A state holds the real parts of all modes, then the imaginary ones.
    """

    log_decay: Tensor
    weight: Tensor
    angle: Tensor | None = None
    weight_im: Tensor | None = None

    @property
    def width(self) -> int:
        """See `StateSpace.width`."""
        return self.log_decay.shape[1] * (1 if self.angle is None else 2)

    def init_state(self, batch: int) -> Tensor:
        """See `StateSpace.init_state`."""
        return self.log_decay.new_zeros(batch, self.log_decay.shape[0], self.width)

    def _readout(self) -> Tensor:
        return self.weight if self.weight_im is None else torch.cat([self.weight, -self.weight_im], dim=-1)

    def _powers(self, count: int, stride: int = 1) -> Tensor:
        """exp(l stride (log_decay + i angle)), l = 0 .. count-1, as states: [channels, count, width]."""
        lags = torch.arange(count, device=self.log_decay.device, dtype=self.log_decay.dtype)[:, None] * stride
        size = torch.exp(self.log_decay[:, None] * lags)
        if self.angle is None:
            return size
        turn = self.angle[:, None] * lags
        return torch.cat([size * torch.cos(turn), size * torch.sin(turn)], dim=-1)

    def _turned(self, state: Tensor, by: Tensor) -> Tensor:
        """States times other states, mode by mode, as complex numbers."""
        if self.angle is None:
            return state * by
        (a, b), (c, d) = state.chunk(2, dim=-1), by.chunk(2, dim=-1)
        return torch.cat([a * c - b * d, a * d + b * c], dim=-1)

    def _weighted(self, powers: Tensor) -> Tensor:
        """The readout's coefficients for the power of every row of `powers`."""
        if self.weight_im is None:
            return powers * self.weight[:, None]
        re, im = self._turned(powers, torch.cat([self.weight, self.weight_im], dim=-1)[:, None]).chunk(2, dim=-1)
        return torch.cat([re, -im], dim=-1)

    def kernel(self, length: int) -> Tensor:
        """See `StateSpace.kernel`; lag l = coarse * a + b."""
        coarse = math.isqrt(length - 1) + 1
        left = self._weighted(self._powers(-(-length // coarse), coarse))
        return exact_product(left, self._powers(coarse).transpose(1, 2)).flatten(1)[:, :length]

    def gathers(self, size: int) -> Tensor:
        """See `StateSpace.gathers`."""
        return self._powers(size)

    def reads(self, size: int) -> Tensor:
        """See `StateSpace.reads`."""
        return self._weighted(self._powers(size))

    def advance(self, steps: int) -> Callable[[Tensor], Tensor]:
        """See `StateSpace.advance`."""
        power = self._powers(2, steps)[:, 1]
        return lambda state: self._turned(state, power)

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """See `StateSpace.step`."""
        drive = wide(u)[..., None].expand(*u.shape, self.log_decay.shape[1])
        if self.angle is not None:
            drive = torch.cat([drive, torch.zeros_like(drive)], dim=-1)
        state = self.advance(1)(state) + drive.to(state.dtype)
        return (state * self._readout()).sum(-1).to(u.dtype), state


@dataclass(frozen=True)
class DenseSystem:
    """Any A: [channels, width, width], and B and C: [channels, width]; float32 or wider, A of norm about 1 or less."""

    A: Tensor
    B: Tensor
    C: Tensor

    @property
    def width(self) -> int:
        """See `StateSpace.width`."""
        return self.A.shape[-1]

    def init_state(self, batch: int) -> Tensor:
        """See `StateSpace.init_state`."""
        return self.A.new_zeros(batch, *self.B.shape)

    def kernel(self, length: int) -> Tensor:
        """See `StateSpace.kernel`; lag l = coarse * a + b with coarse a power of two, reached by squaring."""
        coarse = 1 << ((length - 1).bit_length() + 1) // 2
        right, power = _krylov(self.A, self.B, coarse)
        left, _ = _krylov(power.transpose(1, 2), self.C, -(-length // coarse))
        return (left.transpose(1, 2) @ right).flatten(1)[:, :length].to(self.A.dtype)

    def gathers(self, size: int) -> Tensor:
        """See `StateSpace.gathers`."""
        return _krylov(self.A, self.B, size)[0].transpose(1, 2).to(self.A.dtype)

    def reads(self, size: int) -> Tensor:
        """See `StateSpace.reads`."""
        return _krylov(self.A.transpose(1, 2), self.C, size)[0].transpose(1, 2).to(self.A.dtype)

    def advance(self, steps: int) -> Callable[[Tensor], Tensor]:
        """See `StateSpace.advance`."""
        power = matrix_power(exact(self.A), steps).to(self.A.dtype)
        return lambda state: torch.einsum("hij,...hj->...hi", power, state)

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """See `StateSpace.step`."""
        state = self.advance(1)(state) + self.B * wide(u)[..., None]
        return (state * self.C).sum(-1).to(u.dtype), state


def matrix_power(matrix: Tensor, exponent: int) -> Tensor:
    """matrix^exponent, exponent >= 1, by squaring."""
    result = None
    while exponent:
        if exponent & 1:
            result = matrix if result is None else result @ matrix
        exponent >>= 1
        if exponent:
            matrix = matrix @ matrix
    assert result is not None
    return result


def _krylov(matrix: Tensor, vector: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """matrix^l vector, l = 0 .. count-1, as columns [channels, width, count], by doubling; and matrix^(the first power
    of two that is at least count); both `exact`."""
    matrix, columns = exact(matrix), exact(vector)[..., None]
    while columns.shape[-1] < count:
        columns = torch.cat([columns, matrix @ columns], dim=-1)
        matrix = matrix @ matrix
    return columns[..., :count], matrix
