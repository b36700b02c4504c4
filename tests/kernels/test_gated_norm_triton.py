"""The Triton form of the gated norm against its definition in float64."""

import pytest
import torch
from anymixer_kernels import force_backend
from anymixer_kernels.gated_norm import ONE_PROGRAM, gated_norm
from triton_cases import DEVICE, ON_GPU, TOLERANCE, most_of_the_gpu, needs_triton, poisoned, relative_error  # noqa: F401

pytestmark = needs_triton
SHAPES = [(1, 8), (3, 5, 24), (2, 70, 130), *([(512, 128, 1536), (2, 4097, 1000), (3, 16384)] if ON_GPU else [])]


def make_inputs(shape):
    """x, a wider tensor that the gate is a slice of, weight and a cotangent, in float64."""
    g = torch.Generator().manual_seed(0)
    shapes = (shape, (*shape[:-1], shape[-1] + 16), shape[-1:], shape)
    return [torch.randn(*s, generator=g, dtype=torch.float64) for s in shapes]


def slice_of(wide, width):
    return wide[..., 8 : 8 + width]


def check(pairs, dtype):
    errors = [relative_error(actual, expected) for actual, expected in pairs]
    assert max(errors) < TOLERANCE[dtype], errors


def by_reference(tensors, cotangent):
    leaves = [t.detach().double().requires_grad_() for t in tensors]
    with force_backend("reference"):
        y = gated_norm(*leaves, 1e-5)
    return [y, *torch.autograd.grad(y, leaves, cotangent.double())]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference_with_all_gradients(shape, dtype, poisoned):  # noqa: F811
    x, wide, weight, cotangent = make_inputs(shape)
    x, gate = x.to(DEVICE, dtype), slice_of(wide.to(DEVICE, dtype), shape[-1])
    leaves = [t.detach().requires_grad_() for t in (x, gate, weight.float().to(DEVICE))]
    cotangent = cotangent.to(DEVICE, dtype)
    with force_backend("triton"):
        y = gated_norm(*leaves, 1e-5)
    actual = [y, *torch.autograd.grad(y, leaves, cotangent)]
    assert [t.dtype for t in actual] == [dtype, dtype, dtype, torch.float32]
    check(zip(actual, by_reference(leaves, cotangent)), dtype)


def test_launchers_write_into_slices_and_programs_take_several_tiles(poisoned, monkeypatch):  # noqa: F811
    from anymixer_kernels import triton_rows
    from anymixer_kernels.gated_norm import triton_form
    from anymixer_kernels.gated_norm.triton_form import launch_gated_norm, launch_gated_norm_backward

    monkeypatch.setattr(triton_form, "PROGRAMS", 1)
    monkeypatch.setattr(triton_rows, "MAX_ROWS", 2)
    x, wide, weight, cotangent = (t.float().to(DEVICE) for t in make_inputs((2, 7, 12)))
    gate, out, grad_gate = (slice_of(t, 12) for t in (wide, torch.zeros_like(wide), torch.zeros_like(wide)))
    grad_x = torch.empty_like(x)
    launch_gated_norm(x, gate, weight, 1e-5, out)
    grad_weight = launch_gated_norm_backward(cotangent, x, gate, weight, 1e-5, grad_x, grad_gate)
    expected = by_reference((x, gate, weight), cotangent)
    check(zip((out, grad_x, grad_gate, grad_weight), expected), torch.float32)


def test_inputs_with_gaps_and_expanded_gradients():
    x, wide, weight, _ = (t.float().to(DEVICE) for t in make_inputs((3, 5, 8)))
    leaves = [
        t.detach().requires_grad_() for t in (x.transpose(0, 1).contiguous().transpose(0, 1), wide[..., ::3], weight)
    ]
    with force_backend("triton"):
        y = gated_norm(*leaves, 1e-5)
    check(zip([y, *torch.autograd.grad(y.sum(), leaves)], by_reference(leaves, torch.ones_like(y))), torch.float32)


def test_compiles_without_graph_breaks():
    x, wide, weight, _ = (t.float().to(DEVICE) for t in make_inputs((2, 3, 8)))
    leaves = [t.detach().requires_grad_() for t in (x, slice_of(wide, 8), weight)]
    with force_backend("triton"):
        compiled = torch.compile(gated_norm, backend="aot_eager", fullgraph=True)
        results = [torch.autograd.grad(f(*leaves, 1e-5).square().sum(), leaves) for f in (compiled, gated_norm)]
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected)


def test_too_wide_a_row_is_refused_by_name():
    x = torch.zeros(1, ONE_PROGRAM + 1, device=DEVICE)
    with force_backend("triton"), pytest.raises(RuntimeError, match=r"gated_norm.*wider"):
        gated_norm(x, x, x[0], 1e-5)


@pytest.mark.usefixtures("most_of_the_gpu")
def test_more_than_two_to_the_31_numbers():
    x = torch.randn(2**20 + 8, 2050, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(2050, device=DEVICE)
    y = gated_norm(x, x.detach(), weight, 1e-5)
    (grad_x,) = torch.autograd.grad(y, x, torch.ones_like(y))
    last = x[-2:].detach()
    expected = by_reference((last, last, weight), torch.ones_like(last))
    check(zip((y[-2:], grad_x[-2:]), expected), torch.bfloat16)
