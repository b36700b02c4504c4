"""The gated norm: its fast form against its definition."""

import pytest
import torch
from anymixer_kernels import force_backend
from anymixer_kernels.gated_norm import gated_norm
from anymixer_kernels.gated_norm import torch_form as fast


def inputs(dtype, *shape):
    torch.manual_seed(0)
    return [torch.randn(*s, dtype=dtype).requires_grad_() for s in (shape, shape, shape[-1:])]


@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 8), (2, 37, 16)])
@pytest.mark.parametrize("entries", [1, 64, 2**17])
def test_fast_form_equals_reference_with_all_gradients(shape, entries, monkeypatch):
    monkeypatch.setattr(fast, "BLOCK_ENTRIES", {"cpu": entries})
    tensors = inputs(torch.float64, *shape)
    cotangent = torch.randn(*shape, dtype=torch.float64)
    results = []
    for backend in ("reference", "torch"):
        with force_backend(backend):
            y = gated_norm(*tensors, 1e-5)
        results.append((y, *torch.autograd.grad((y * cotangent).sum(), tensors)))
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_strided_and_low_precision_inputs():
    x, gate, weight = inputs(torch.float32, 4, 6, 8)
    wide_x, wide_gate = torch.cat([x, x], -1).bfloat16(), torch.cat([gate, gate], -1).bfloat16()
    y = gated_norm(wide_x[..., 8:], wide_gate[..., :8], weight, 1e-5)
    assert y.dtype == torch.bfloat16
    with force_backend("reference"):
        expected = gated_norm(x, gate, weight, 1e-5)
    assert (y.float() - expected).norm() / expected.norm() < 1e-2
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32
