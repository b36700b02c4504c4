"""The cross entropy over a vocabulary: PyTorch's and Triton's forms against the definition in float64."""

import pytest
import torch
from anymixer_kernels import force_backend
from anymixer_kernels.cross_entropy import cross_entropy
from triton_cases import DEVICE, ON_GPU, TOLERANCE, most_of_the_gpu, needs_triton, poisoned, relative_error  # noqa: F401

SHAPES = [(1, 2), (5, 7), (3, 130), (4, 9000), *([(9830, 30528)] if ON_GPU else [])]
BACKENDS = ["torch", pytest.param("triton", marks=needs_triton)]


def make_inputs(shape, dtype=torch.float64):
    """Logits with gaps between rows, targets of which some count nothing, and a cotangent."""
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(shape[0], shape[1] + 3, generator=g, dtype=torch.float64) * 4
    targets = torch.randint(0, shape[1], (shape[0],), generator=g)
    targets[1::3] = -100
    cotangent = torch.randn(shape[0], generator=g, dtype=torch.float64)
    return wide.to(DEVICE, dtype)[:, : shape[1]], targets.to(DEVICE), cotangent.to(DEVICE, torch.float32)


def with_gradient(backend, logits, targets, cotangent):
    leaf = logits.detach().requires_grad_()
    with force_backend(backend):
        losses = cross_entropy(leaf, targets)
    (grad,) = torch.autograd.grad(losses, leaf, cotangent.to(losses.dtype))
    return losses, grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference_with_its_gradient(shape, dtype, backend, poisoned):  # noqa: F811
    logits, targets, cotangent = make_inputs(shape, dtype)
    losses, grad = with_gradient(backend, logits, targets, cotangent)
    expected, expected_grad = with_gradient("reference", logits.double(), targets, cotangent)
    assert losses.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(losses.double(), expected, atol=1e-5, rtol=1e-5)
    assert relative_error(grad, expected_grad) < TOLERANCE[dtype]
    assert not losses[targets < 0].any() and not grad[targets < 0].any()


@needs_triton
@pytest.mark.usefixtures("most_of_the_gpu")
def test_more_entries_than_32_bits_count():
    """Rows on both sides of the entry number 2^31, alone in float64."""
    rows, classes = 70_000, 30_720
    torch.manual_seed(0)
    logits = torch.randn(rows, classes, dtype=torch.bfloat16, device=DEVICE)
    targets, cotangent = torch.randint(classes, (rows,), device=DEVICE), torch.randn(rows, device=DEVICE)
    edge = 2**31 // classes
    some = torch.tensor([0, 1, edge - 1, edge, edge + 1, rows - 1], device=DEVICE)
    losses, grad = with_gradient("triton", logits, targets, cotangent)
    expected, expected_grad = with_gradient("reference", logits[some].double(), targets[some], cotangent[some])
    torch.testing.assert_close(losses[some].double(), expected, atol=1e-5, rtol=1e-5)
    for row in range(len(some)):
        assert relative_error(grad[some[row]], expected_grad[row]) < TOLERANCE[torch.bfloat16]


def test_the_reference_is_the_definition():
    logits, targets, _ = make_inputs((5, 7))
    probabilities = logits.exp() / logits.exp().sum(1, keepdim=True)
    for row, target in enumerate(targets.tolist()):
        expected = 0.0 if target < 0 else -probabilities[row, target].log()
        assert float(cross_entropy(logits, targets)[row]) == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_and_infinite_logits(backend):
    """A class of probability 0 (minus infinity, whole blocks of them) takes part in nothing."""
    logits = torch.full((3, 9000), -torch.inf, device=DEVICE)
    logits[0, 8500], logits[1, :2], logits[2, 0], logits[2, 8999] = 1e4, 1e4, -1e4, -1e4
    targets = torch.tensor([8500, 1, 8999], device=DEVICE)
    losses, grad = with_gradient(backend, logits, targets, torch.ones(3, device=DEVICE))
    torch.testing.assert_close(losses.cpu(), torch.tensor([0.0, 0.6931472, 0.6931472]))
    assert grad.isfinite().all() and float(grad[2, 0]) == pytest.approx(0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    logits, targets, cotangent = torch.zeros(0, 9), torch.zeros(0, dtype=torch.long), torch.zeros(0)
    losses, grad = with_gradient(backend, logits.to(DEVICE), targets.to(DEVICE), cotangent.to(DEVICE))
    assert losses.shape == (0,) and grad.shape == (0, 9)


@needs_triton
def test_gradcheck_of_the_definition_and_the_op_contract():
    logits, targets, _ = make_inputs((4, 6))
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, targets), logits.detach().requires_grad_())
    from anymixer_kernels.cross_entropy import triton_form

    leaf = logits.float().detach().requires_grad_()
    torch.library.opcheck(triton_form._op, (leaf, targets), test_utils=("test_schema", "test_faketensor"))


@needs_triton
def test_a_class_that_does_not_exist_is_nan_and_no_neighbour_s_loss():
    logits, targets, _ = make_inputs((3, 7), torch.float32)
    targets[0] = 7
    with force_backend("triton"):
        losses = cross_entropy(logits, targets)
    assert losses[0].isnan() and losses[1:].isfinite().all()
