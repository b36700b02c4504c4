"""Discretizations, against complex arithmetic and known kernels."""

import pytest
import torch
from anymixer_kernels.lti import DiagonalSystem

from anymixer.layers.discretize import bilinear, hold
from anymixer.layers.hippo import hippo

RULES = {
    hold: lambda a, dt: (torch.exp(dt * a), (torch.exp(dt * a) - 1) / a),
    bilinear: lambda a, dt: ((1 + dt * a / 2) / (1 - dt * a / 2), dt / (1 - dt * a / 2)),
}


@pytest.mark.parametrize("rule", RULES)
def test_rules_equal_complex_arithmetic(rule):
    torch.manual_seed(0)
    a = torch.complex(-torch.rand(50, dtype=torch.float64), 40 * torch.randn(50, dtype=torch.float64))
    dt = torch.rand(50, dtype=torch.float64)
    log_decay, angle, (re, im) = rule((a.real, a.imag), dt)
    step, drive = RULES[rule](a, dt)
    torch.testing.assert_close(torch.polar(log_decay.exp(), angle), step)
    torch.testing.assert_close(torch.complex(re, im), drive)


@pytest.mark.parametrize("rule", RULES)
def test_small_steps_lose_no_digits_in_float32(rule):
    a = (torch.tensor([-0.5, -0.5]), torch.tensor([0.0, 1e-3]))
    low = rule(a, torch.tensor(1e-4))
    high = rule((a[0].double(), a[1].double()), torch.tensor(1e-4).double())
    torch.testing.assert_close(low[0].double(), high[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(low[2][0].double(), high[2][0], rtol=1e-6, atol=0)


KERNELS = {  # of LegS with 4 states, step 0.1, C = 1
    bilinear: [0.5470522, 0.22343937, 0.06399393, -0.00459942, -0.02562155],
    hold: [0.52993287, 0.22122166, 0.06768143, 0.00057333, -0.02090998],
}


@pytest.mark.parametrize("rule", KERNELS)
def test_known_kernels_of_legs(rule):
    A, B = hippo("legs", 4)
    eigenvalues, V = torch.linalg.eig(A)
    assert eigenvalues.imag.abs().max() < 1e-9
    log_decay, angle, drive = rule((eigenvalues.real, eigenvalues.imag), torch.tensor(0.1, dtype=torch.float64))
    assert angle.abs().max() < 1e-9
    weight = V.real.sum(0) * torch.linalg.solve(V.real, B) * drive[0]
    kernel = DiagonalSystem(log_decay[None], weight[None]).kernel(5)[0]
    torch.testing.assert_close(kernel, torch.tensor(KERNELS[rule], dtype=torch.float64), rtol=0, atol=5e-8)
