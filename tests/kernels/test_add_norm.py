"""The residual sum with its LayerNorm: every form against PyTorch's LayerNorm in float64."""

import pytest
import torch
from anymixer_kernels import force_backend
from anymixer_kernels.add_norm import ONE_PROGRAM, add_norm, add_norm_and_copy
from torch.nn.functional import layer_norm
from triton_cases import DEVICE, ON_GPU, TOLERANCE, most_of_the_gpu, needs_triton, poisoned, relative_error  # noqa: F401

SHAPES = [(1, 8), (3, 5, 24), (2, 70, 130), *([(512, 128, 768), (2, 4097, 1000), (3, 16384)] if ON_GPU else [])]
EPS = 1e-5


def make_inputs(shape, dtype, branch_dtype, device="cpu"):
    """residual; branch, a slice of a wider tensor; weight; bias."""
    g = torch.Generator().manual_seed(0)
    residual, wide = (torch.randn(*shape[:-1], shape[-1] + 16 * i, generator=g, dtype=torch.float64) for i in range(2))
    weight, bias = torch.randn(2, shape[-1], generator=g, dtype=torch.float64)
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = (residual.to(dtype) + 0.5, wide.to(branch_dtype)[..., 8 : 8 + shape[-1]], weight, bias)
    kinds = (dtype, branch_dtype, parameters, parameters)
    return [t.to(device, kind).detach().requires_grad_() for t, kind in zip(tensors, kinds)]


def with_grads(form, tensors, cotangent):
    y = form(*tensors)
    return [y, *torch.autograd.grad(y, tensors, cotangent.to(y.dtype))]


def layer_norm_of(tensors, cotangent):
    """In float64, of the same numbers."""
    leaves = [t.detach().double().requires_grad_() for t in tensors]
    return with_grads(lambda r, b, *p: layer_norm(r + b, r.shape[-1:], *p, eps=EPS), leaves, cotangent)


def check(pairs, tolerance):
    errors = [relative_error(actual, expected) for actual, expected in pairs]
    assert max(errors) < tolerance, errors


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_plain_forms_equal_layer_norm_in_float64(backend):
    tensors = make_inputs((3, 5, 24), torch.float64, torch.float64)
    cotangent = torch.randn(3, 5, 24, dtype=torch.float64)
    with force_backend(backend):
        actual = with_grads(lambda *t: add_norm(*t, EPS), tensors, cotangent)
    check(zip(actual, layer_norm_of(tensors, cotangent)), 1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_sum_is_not_rounded_and_the_result_is_as_asked(backend):
    tensors = make_inputs((4, 24), torch.float32, torch.bfloat16)
    with force_backend(backend):
        assert add_norm(*tensors, EPS).dtype == torch.float32
        y = add_norm(*tensors, EPS, dtype=torch.bfloat16)
        without_bias = add_norm(*tensors[:3], None, EPS)
    assert y.dtype == torch.bfloat16
    exact = layer_norm_of(tensors, torch.ones(4, 24))[0]
    assert torch.equal(y, exact.float().bfloat16())
    check([(without_bias + tensors[3], exact)], 1e-6)


@needs_triton
@pytest.mark.parametrize("branch_dtype", TOLERANCE)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_equals_layer_norm_with_all_gradients(shape, dtype, branch_dtype, poisoned):  # noqa: F811
    tensors = make_inputs(shape, torch.float32, branch_dtype, DEVICE)
    cotangent = torch.randn(shape).to(DEVICE, dtype)
    with force_backend("triton"):
        actual = with_grads(lambda *t: add_norm(*t, EPS, dtype=dtype), tensors, cotangent)
    assert [t.dtype for t in actual] == [dtype, torch.float32, branch_dtype, torch.float32, torch.float32]
    expected = layer_norm_of(tensors, cotangent)
    check(zip(actual, expected), TOLERANCE[torch.bfloat16])
    # What is returned in float32 is exact, whatever comes in.
    exact = [pair for pair in zip(actual, expected) if pair[0].dtype == torch.float32]
    check(exact, TOLERANCE[torch.float32])


@needs_triton
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)])
def test_a_copy_in_autocasts_type_gives_its_gradient_back(backend, used, poisoned):  # noqa: F811
    tensors = make_inputs((2, 35, 136), torch.float32, torch.bfloat16, DEVICE)
    weights = [scale * torch.randn(2, 35, 136).bfloat16().to(DEVICE) * use for scale, use in zip((1.0, 2.0), used)]
    with force_backend(backend):
        y, copy = add_norm_and_copy(*tensors, EPS, torch.bfloat16)
    assert (y.dtype, copy.dtype) == (torch.float32, torch.bfloat16)
    # Triton's interpreter cuts digits off where the hardware rounds.
    torch.testing.assert_close(copy.float(), y, rtol=2**-8 if ON_GPU or backend == "torch" else 2**-7, atol=0.0)
    outputs = [(o, w) for o, w, use in zip((y, copy), weights, used) if use]
    grads = torch.autograd.grad([o for o, _ in outputs], tensors, [w.to(o.dtype) for o, w in outputs])
    expected = layer_norm_of(tensors, weights[0].float() + weights[1].float())
    check(zip((y, grads[0], *grads[2:]), (expected[0], expected[1], *expected[3:])), 1e-4)
    check([(grads[1], expected[2])], TOLERANCE[torch.bfloat16])


@needs_triton
def test_triton_without_bias_and_with_several_tiles_a_program(poisoned, monkeypatch):  # noqa: F811
    from anymixer_kernels import triton_rows
    from anymixer_kernels.add_norm import triton_form

    monkeypatch.setattr(triton_form, "PROGRAMS", 1)
    monkeypatch.setattr(triton_rows, "MAX_ROWS", 2)
    tensors = make_inputs((2, 7, 12), torch.float32, torch.float32, DEVICE)[:3]
    cotangent = torch.randn(2, 7, 12).to(DEVICE)
    with force_backend("triton"):
        actual = with_grads(lambda *t: add_norm(*t, None, EPS), tensors, cotangent)
    check(zip(actual, layer_norm_of(tensors, cotangent)), 1e-4)


@needs_triton
def test_triton_compiles_without_graph_breaks():
    tensors = make_inputs((2, 3, 8), torch.float32, torch.bfloat16, DEVICE)
    with force_backend("triton"):
        compiled = torch.compile(add_norm, backend="aot_eager", fullgraph=True)
        results = [
            with_grads(lambda *t, f=f: f(*t, EPS), tensors, torch.ones(2, 3, 8, device=DEVICE))
            for f in (compiled, add_norm)
        ]
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected)


@needs_triton
def test_too_wide_a_row_is_refused_by_name():
    x = torch.zeros(1, ONE_PROGRAM + 1, device=DEVICE)
    with force_backend("triton"), pytest.raises(RuntimeError, match=r"add_norm.*wider"):
        add_norm(x, x, x[0], None, EPS)


@needs_triton
@pytest.mark.usefixtures("most_of_the_gpu")
def test_more_than_two_to_the_31_numbers():
    residual = torch.randn(2**20 + 8, 2050, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight, bias = torch.randn(2, 2050, device=DEVICE)
    y = add_norm(residual, residual.detach(), weight, bias, EPS)
    (grad,) = torch.autograd.grad(y, residual, torch.ones_like(y))
    last = residual[-2:].detach()
    expected = layer_norm_of((last, last, weight, bias), torch.ones_like(last))
    check(zip((y[-2:], grad[-2:]), expected), TOLERANCE[torch.bfloat16])
