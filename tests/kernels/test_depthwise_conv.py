"""Depthwise convolution that keeps to its own sequence."""

import pytest
import torch
from anymixer_kernels import force_backend
from anymixer_kernels.depthwise_conv import depthwise_conv, depthwise_conv_step


@pytest.mark.parametrize("width", [1, 3, 7])
def test_each_packed_sequence_is_convolved_as_if_alone(width):
    torch.manual_seed(0)
    x = torch.randn(1, 11, 4, dtype=torch.float64)
    weight, bias = torch.randn(4, 1, width, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    ids = torch.tensor([[0, 0, 0, 0, 1, 2, 2, 2, 2, -1, -1]])
    together = depthwise_conv(x, weight, bias, sequence_id=ids)
    for start, end in ((0, 4), (4, 5), (5, 9)):
        alone = depthwise_conv(x[:, start:end], weight, bias)
        torch.testing.assert_close(together[:, start:end], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("width", "causal"), [(5, False), (5, True), (4, True), (1, True)])
def test_fast_form_equals_reference_with_gradients(packed, width, causal):
    torch.manual_seed(0)
    arguments = [torch.randn(2, 9, 3), torch.randn(3, 1, width), torch.randn(3)]
    arguments = [a.double().requires_grad_() for a in arguments]
    ids = torch.tensor([[0] * 9, [0] * 6 + [-1] * 3])
    results = []
    for backend in ("reference", "torch"):
        with force_backend(backend):
            y = depthwise_conv(*arguments, sequence_id=ids, packed=packed, causal=causal)
        y = y * (ids >= 0)[..., None]
        results.append([y, *torch.autograd.grad(y.square().sum(), arguments)])
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("width", [1, 4])
def test_causal_steps_give_what_the_whole_row_gives(width):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 9, 3), torch.randn(3, 1, width), torch.randn(3)
    expected = depthwise_conv(x, weight, bias, causal=True)
    changed = x.clone()
    changed[:, 5:] = 0
    assert torch.equal(depthwise_conv(changed, weight, bias, causal=True)[:, :5], expected[:, :5])
    before = torch.zeros(2, width - 1, 3)
    for t in range(9):
        y, before = depthwise_conv_step(x[:, t], weight, bias, before)
        torch.testing.assert_close(y, expected[:, t])
