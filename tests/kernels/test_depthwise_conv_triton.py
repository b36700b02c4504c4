"""The Triton form of the depthwise convolution against its definition in float64."""

import pytest
import torch
from anymixer_kernels import force_backend
from anymixer_kernels.depthwise_conv import UNROLLED, depthwise_conv
from triton_cases import DEVICE, ON_GPU, TOLERANCE, most_of_the_gpu, needs_triton, packed_ids, poisoned, relative_error  # noqa: F401

pytestmark = needs_triton
LENGTHS = [1, 2, 63, 127, 128, 500, 4097] if ON_GPU else [1, 11]
CHANNELS = 1792 if ON_GPU else 5


def make_inputs(length, width, channels=CHANNELS, batch=2):
    """x as a slice of a wider tensor, weight, bias and a cotangent, in float64."""
    g = torch.Generator().manual_seed(0)
    wide, weight, bias, cotangent = (
        torch.randn(*shape, generator=g, dtype=torch.float64)
        for shape in ((batch, length, channels + 24), (channels, 1, width), (channels,), (batch, length, channels))
    )
    return wide, weight / width**0.5, bias, cotangent


def ids_with_a_gap(length):
    """`packed_ids`, with padding between two sequences too."""
    ids = packed_ids(length)
    ids[0, length // 3 : length // 3 + 2] = -1
    return ids


def both_ways(inputs, dtype, ids=None, bias=True, **options):
    """(by Triton in `dtype`, by the reference in float64) of the output and every gradient."""
    wide, weight, offset, cotangent = inputs
    channels = weight.shape[0]
    real = torch.ones(wide.shape[:2], dtype=torch.bool) if ids is None else ids >= 0
    narrow = [wide.to(DEVICE, dtype)[..., 8 : 8 + channels], weight.float().to(DEVICE)]
    narrow += [offset.float().to(DEVICE)] if bias else []
    results = []
    # The reference reads what the narrow type holds, so that the error is the computation's alone.
    for backend, tensors in (("triton", narrow), ("reference", [t.double() for t in narrow])):
        leaves = [t.detach().requires_grad_() for t in tensors]
        with force_backend(backend):
            y = depthwise_conv(
                *leaves[:2], leaves[2] if bias else None, sequence_id=None if ids is None else ids.to(DEVICE), **options
            )
        masked = y * real[..., None].to(DEVICE)
        grad_y = (cotangent * real[..., None]).to(DEVICE, y.dtype)
        results.append([masked, *torch.autograd.grad(y, leaves, grad_y)])
    return list(zip(*results))


def check(pairs, dtype):
    errors = [relative_error(actual, expected) for actual, expected in pairs]
    assert max(errors) < TOLERANCE[dtype], errors


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("width", "causal"), [(7, False), (4, True)])
@pytest.mark.parametrize("length", LENGTHS)
def test_rows_of_one_sequence(length, width, causal, dtype, poisoned):  # noqa: F811
    check(both_ways(make_inputs(length, width), dtype, causal=causal), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("width", "causal"), [(7, False), (4, True)])
@pytest.mark.parametrize("length", LENGTHS[1:])
def test_packed_rows(length, width, causal, dtype, poisoned):  # noqa: F811
    check(both_ways(make_inputs(length, width), dtype, ids_with_a_gap(length), causal=causal), dtype)


@pytest.mark.parametrize("ids", [None, ids_with_a_gap(21)])
@pytest.mark.parametrize(
    ("width", "causal", "activate", "parts"),
    [
        (1, False, True, 4),
        (9, False, True, 1),
        (9, False, False, 4),
        (4, False, True, 4),
        (6, True, True, 1),
        (6, True, False, 4),
    ],
)
def test_rows_of_several_parts(width, causal, activate, parts, ids, poisoned, monkeypatch):  # noqa: F811
    from anymixer_kernels.depthwise_conv import triton_form

    monkeypatch.setattr(triton_form, "FORWARD_TOKENS", 8)
    monkeypatch.setattr(triton_form, "BACKWARD_TOKENS", 8)
    monkeypatch.setattr(triton_form, "BACKWARD_PARTS", parts)
    monkeypatch.setattr(triton_form, "ENOUGH_PROGRAMS", 0)
    inputs = make_inputs(21, width, channels=3)
    check(both_ways(inputs, torch.float32, ids, causal=causal, activate=activate), torch.float32)


def test_several_blocks_of_channels_without_bias(poisoned):  # noqa: F811
    check(both_ways(make_inputs(5, 3, channels=150), torch.float32, bias=False), torch.float32)


def test_the_widest_window(poisoned):  # noqa: F811
    check(both_ways(make_inputs(34, UNROLLED, channels=3), torch.float32, ids_with_a_gap(34)), torch.float32)


@pytest.mark.parametrize(("width", "causal"), [(7, False), (4, True)])
def test_ids_that_come_back(width, causal, poisoned):  # noqa: F811
    ids = torch.tensor([[3] * 33 + [-1] + [3] * 6, [0, 1, 0, 1, 0, 0] + [-1] * 2 + [5] * 32])
    check(both_ways(make_inputs(40, width, channels=3), torch.float32, ids, causal=causal), torch.float32)


def test_inputs_with_uneven_gaps(poisoned):  # noqa: F811
    leaves = [t.float().to(DEVICE) for t in make_inputs(2, 3, channels=4, batch=9)]
    x = leaves[0].transpose(0, 1)[..., 3:7]
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        inputs = [t.to(dtype).requires_grad_() for t in (x, *leaves[1:3])]
        with force_backend(backend):
            y = depthwise_conv(*inputs)
        cotangent = leaves[3].to(dtype).transpose(0, 1)
        results.append([y, *torch.autograd.grad(y, inputs, cotangent)])
    check(zip(*results), torch.float32)


def test_padding_may_hold_anything(poisoned):  # noqa: F811
    wide, weight, bias, cotangent = make_inputs(11, 7)
    ids = ids_with_a_gap(11)
    wide[ids < 0], cotangent[ids < 0] = torch.nan, torch.nan
    x = wide.float().to(DEVICE).requires_grad_()
    with force_backend("triton"):
        y = depthwise_conv(
            x[..., :CHANNELS], weight.float().to(DEVICE), bias.float().to(DEVICE), sequence_id=ids.to(DEVICE)
        )
    y.backward(cotangent.float().to(DEVICE))
    for result in (y, x.grad):
        assert result.isfinite().all()
        assert (result[ids.to(DEVICE) < 0] == 0).all()


def test_launchers_write_into_slices(poisoned):  # noqa: F811
    from anymixer_kernels.depthwise_conv.triton_form import launch_conv, launch_conv_backward

    wide, weight, bias, cotangent = (t.float().to(DEVICE) for t in make_inputs(9, 7))
    x = wide[..., :CHANNELS].requires_grad_()
    out, grad_x = torch.zeros_like(wide)[..., 16 : 16 + CHANNELS], torch.zeros_like(wide)[..., 8 : 8 + CHANNELS]
    options = {"activate": True, "causal": False}
    launch_conv(x, weight, bias, None, out, **options)
    grads = launch_conv_backward(cotangent, x, weight, bias, None, grad_x, **options)
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    with force_backend("reference"):
        y = depthwise_conv(*leaves)
    expected = torch.autograd.grad(y, leaves, cotangent.double())
    check(zip((out, grad_x, *grads), (y, *expected)), torch.float32)


def test_compiles_without_graph_breaks():
    wide, weight, bias, _ = (t.float().to(DEVICE) for t in make_inputs(5, 3))
    x, weight = wide[..., :CHANNELS].requires_grad_(), weight.requires_grad_()
    with force_backend("triton"):
        compiled = torch.compile(depthwise_conv, backend="aot_eager", fullgraph=True)
        results = [
            torch.autograd.grad(f(x, weight, bias).square().sum(), (x, weight)) for f in (compiled, depthwise_conv)
        ]
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected)


def test_too_wide_a_kernel_is_refused_by_name():
    x, weight = torch.zeros(1, 2, 3, device=DEVICE), torch.zeros(3, 1, UNROLLED + 1, device=DEVICE)
    with force_backend("triton"), pytest.raises(RuntimeError, match=r"depthwise_conv.*taps"):
        depthwise_conv(x, weight, None)


@pytest.mark.usefixtures("most_of_the_gpu")
def test_more_than_two_to_the_31_numbers():
    rows, channels = 2**16 + 8, 260
    x = torch.randn(rows, 128, channels, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    _, weight, bias, _ = (t.float().to(DEVICE) for t in make_inputs(1, 7, channels))
    y = depthwise_conv(x, weight, bias)
    (grad_x,) = torch.autograd.grad(y, x, torch.ones_like(y))
    last = x[-2:].detach().double().requires_grad_()
    with force_backend("reference"):
        expected = depthwise_conv(last, weight.double(), bias.double())
    check([(y[-2:], expected), (grad_x[-2:], torch.autograd.grad(expected.sum(), last)[0])], torch.bfloat16)
