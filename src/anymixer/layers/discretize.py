"""From x' = A x + B u, A diagonal, to x_t = A_bar x_{t-1} + B_bar u_t, in real arithmetic: a complex tensor is the pair
of its real and imaginary parts."""

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def times(a: Pair, b: Pair) -> Pair:
    """The complex product."""
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def over(a: Pair, b: Pair) -> Pair:
    """The complex quotient."""
    size = b[0].square() + b[1].square()
    re, im = times(a, (b[0], -b[1]))
    return re / size, im / size


def exp_minus_one(re: Tensor, im: Tensor) -> Pair:
    """exp(re + i im) - 1, without cancellation near 0."""
    return torch.expm1(re) * torch.cos(im) - 2 * torch.sin(im / 2).square(), torch.exp(re) * torch.sin(im)


def hold(a: Pair, dt: Tensor) -> tuple[Tensor, Tensor, Pair]:
    """Zero-order hold: the logarithm of A_bar = exp(dt A), real and imaginary part, and B_bar / B = (A_bar - 1) / A.

    a: A, of one shape with dt.
    """
    re, im = dt * a[0], dt * a[1]
    return re, im, over(exp_minus_one(re, im), a)


def bilinear(a: Pair, dt: Tensor) -> tuple[Tensor, Tensor, Pair]:
    """The bilinear (Tustin) rule: A_bar = (1 + dt A / 2) / (1 - dt A / 2), B_bar / B = dt / (1 - dt A / 2); returns as
    `hold`."""
    re, im = dt * a[0] / 2, dt * a[1] / 2
    square = re.square() + im.square()
    log_size = (torch.log1p(square + 2 * re) - torch.log1p(square - 2 * re)) / 2
    angle = torch.atan2(im, 1 + re) + torch.atan2(im, 1 - re)
    return log_size, angle, over((dt, torch.zeros_like(dt)), (1 - re, -im))
