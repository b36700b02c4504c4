"""S4's system: x' = (Lambda - 2 P P^T) x + B u by the bilinear rule, in real arithmetic; O(width) but for powers.

A complex state is the row of its real parts and then its imaginary ones, one of each pair of conjugates; Lambda turns
and shrinks a pair, P P^T stands for the product P P^* over all conjugates. With M = 1 - A / 2 the rule is

    A_bar = M^-1 (2 - M) = 2 M^-1 - 1        B_bar = M^-1 B        M = (1 - Lambda / 2) + P P^T

and M^-1 is Woodbury's. The kernel comes by Cauchy sums at the roots of unity w (arXiv 2111.00396, section 3),

    sum_{l < L} K_l w^l = C (1 - A_bar^L) [(1 - w) - g A]^-1 B        g = (1 + w) / 2

in which nothing is divided by 1 + w, or by powers of A_bar.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from anymixer_kernels.blockwise import wide
from anymixer_kernels.lti.systems import DenseSystem, exact, exact_product


@dataclass(frozen=True)
class LowRankSystem:
    """re, im: of Lambda, [channels, width / 2]. P: [channels, rank, width]; B, C: [channels, width]; all of the system
    whose step is 1, float32 or wider; y = C x. cauchy: how kernels are computed; otherwise by powers of A_bar.
    dense_step: step with the whole A_bar."""

    re: Tensor
    im: Tensor
    P: Tensor
    B: Tensor
    C: Tensor
    cauchy: bool = True
    dense_step: bool = False

    @property
    def width(self) -> int:
        """See `StateSpace.width`."""
        return self.B.shape[1]

    def init_state(self, batch: int) -> Tensor:
        """See `StateSpace.init_state`."""
        return self.B.new_zeros(batch, *self.B.shape)

    def _resolvent(self) -> tuple[Tensor, Tensor]:
        """1 / (1 - Lambda / 2)."""
        re, im = 1 - self.re / 2, self.im / 2
        size = re.square() + im.square()
        return re / size, im / size

    def _correction(self) -> tuple[Tensor, Tensor]:
        """Rows E [channels, rank, width] and F, such that M^-1 = (1 - Lambda / 2)^-1 - F^T E."""
        re, im = self._resolvent()
        after, before = _turned(self.P, (re[:, None], im[:, None])), _turned(self.P, (re[:, None], -im[:, None]))
        gram = torch.eye(self.P.shape[1], dtype=re.dtype, device=re.device) + exact_product(after, self.P.mT)
        return before, exact_product(torch.linalg.inv(gram), after) if self.P.shape[1] > 1 else after / gram

    def _solve(self, x: Tensor) -> Tensor:
        """M^-1 x for x [..., channels, width]."""
        rows, columns = self._correction()
        inner = (rows * x[..., None, :]).sum(-1, keepdim=True)
        return _turned(x, self._resolvent()) - (columns * inner).sum(-2)

    def dense(self) -> DenseSystem:
        """The same system with A_bar written out."""
        re, im = (torch.diag_embed(part) for part in self._resolvent())
        rows, columns = self._correction()
        inverse = torch.cat([torch.cat([re, -im], dim=2), torch.cat([im, re], dim=2)], dim=1)
        inverse = inverse - exact_product(columns.mT, rows)
        one = torch.eye(self.width, dtype=re.dtype, device=re.device)
        return DenseSystem(2 * inverse - one, self._solve(self.B), self.C)

    def kernel(self, length: int) -> Tensor:
        """See `StateSpace.kernel`."""
        return self._cauchy_kernel(length) if self.cauchy else self.dense().kernel(length)

    def gathers(self, size: int) -> Tensor:
        """See `StateSpace.gathers`."""
        return self.dense().gathers(size)

    def reads(self, size: int) -> Tensor:
        """See `StateSpace.reads`."""
        return self.dense().reads(size)

    def advance(self, steps: int) -> Callable[[Tensor], Tensor]:
        """See `StateSpace.advance`."""
        return self.dense().advance(steps)

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """See `StateSpace.step`."""
        if self.dense_step:
            return self.dense().step(u, state)
        state = self._solve(2 * state + self.B * wide(u)[..., None]) - state
        return (state * self.C).sum(-1).to(u.dtype), state

    def _cauchy_kernel(self, length: int) -> Tensor:
        readout = self.C - _row_times_power(self.C, self.dense().A, length)
        # The nodes in float64: powers of a rounded root of unity drift away from the circle.
        angle = torch.arange(length // 2 + 1, dtype=torch.float64, device=self.re.device) * (-2 * torch.pi / length)
        a = _complex(2 * torch.sin(angle / 2).square(), -torch.sin(angle), self.re.dtype)
        g = _complex((1 + torch.cos(angle)) / 2, torch.sin(angle) / 2, self.re.dtype)
        rows = torch.cat([readout[:, None], self.P], dim=1)
        columns = torch.cat([self.B[:, None], self.P], dim=1)
        sums = self._cauchy_sums(rows, columns, a, g)
        spectrum, by_row, by_column = sums[..., 0, 0], sums[..., :1, 1:], sums[..., 1:, :1]
        gram = 2 * g[:, None, None] * sums[..., 1:, 1:]
        if gram.shape[-1] == 1:
            inner = (by_row * by_column / (1 + gram))[..., 0, 0]
        else:
            one = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
            inner = (by_row[..., 0, :] * torch.linalg.solve(one + gram, by_column)[..., 0]).sum(-1)
        return torch.fft.irfft(spectrum - 2 * g * inner, n=length)

    def _cauchy_sums(self, rows: Tensor, columns: Tensor, a: Tensor, g: Tensor) -> Tensor:
        """rows (a - g Lambda)^-1 columns^T at every node: [channels, nodes, rows, columns], complex.

        The inverse of a pair's 2 x 2 block has the denominator (a - g lambda) (a - g conj(lambda)); real coefficients
        multiply it, so that the sum over pairs is a product of real matrices.
        """
        (r1, r2), (c1, c2) = rows[:, :, None].chunk(2, dim=-1), columns[:, None].chunk(2, dim=-1)
        straight = r1 * c1 + r2 * c2
        turned = self.im[:, None, None] * (r2 * c1 - r1 * c2) - self.re[:, None, None] * straight
        coefficients = torch.stack([straight, turned]).flatten(2, 3).movedim(0, 1).flatten(1, 2).transpose(1, 2)

        a_re, a_im, g_re, g_im = (part[:, None] for part in (a.real, a.imag, g.real, g.imag))
        re, im = self.re[:, None], self.im[:, None]
        base_re, base_im = a_re - g_re * re, a_im - g_im * re
        up_re, up_im = base_re + g_im * im, base_im - g_re * im
        down_re, down_im = base_re - g_im * im, base_im + g_re * im
        d_re, d_im = up_re * down_re - up_im * down_im, up_re * down_im + up_im * down_re
        size = d_re.square() + d_im.square()
        summed = torch.complex(*(exact_product(part / size, coefficients) for part in (d_re, -d_im)))
        straight_sum, turned_sum = summed.unflatten(-1, (2, rows.shape[1], columns.shape[1])).unbind(2)
        return a[:, None, None] * straight_sum + g[:, None, None] * turned_sum


def _turned(x: Tensor, by: tuple[Tensor, Tensor]) -> Tensor:
    """States [..., width] times complex numbers, pair by pair."""
    re, im = x.chunk(2, dim=-1)
    return torch.cat([re * by[0] - im * by[1], re * by[1] + im * by[0]], dim=-1)


def _complex(re: Tensor, im: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.complex(re.to(dtype), im.to(dtype))


def _row_times_power(row: Tensor, matrix: Tensor, exponent: int) -> Tensor:
    """row matrix^exponent: [channels, width], [channels, width, width]."""
    row, matrix, dtype = exact(row)[:, None], exact(matrix), row.dtype
    while exponent:
        if exponent & 1:
            row = row @ matrix
        exponent >>= 1
        if exponent:
            matrix = matrix @ matrix
    return row[:, 0].to(dtype)
