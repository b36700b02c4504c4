"""Hydra's core as one Triton op against its parts in float64, each by its definition."""

import dataclasses
import itertools

import pytest
import torch
from anymixer_kernels import force_backend
from anymixer_kernels.quasiseparable import triton_form as mixing
from anymixer_kernels.quasiseparable import triton_gradients, triton_mix
from triton_cases import DEVICE, ON_GPU, TOLERANCE, needs_triton, packed_ids, poisoned, relative_error  # noqa: F401

from anymixer.mixers.hydra import Hydra

pytestmark = needs_triton
D_MODEL = 768 if ON_GPU else 32
OPTIONS = ({}, {"ngroups": 2}, {"free_diagonal": False, "conv_bias": False})
CASES = (
    list(itertools.product((1, 100, 128, 500, 2049), (False, True), OPTIONS, (torch.float32, torch.bfloat16)))
    if ON_GPU
    else [
        (1, False, OPTIONS[0], torch.float32),
        (30, False, OPTIONS[2], torch.float32),
        (30, True, OPTIONS[0], torch.bfloat16),
        (150, True, OPTIONS[1], torch.float32),
    ]
)


def make_block(**options):
    torch.manual_seed(0)
    sizes = {"d_state": 64, "headdim": 64} if ON_GPU else {"d_state": 16, "headdim": 16}
    block = Hydra(D_MODEL, **(sizes | options))
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if name in ("A_log", "D", "norm.weight"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return block


def run(block, backend, projected, cotangent, ids):
    """The core's output and the gradients of its input and of every parameter it reads."""
    from anymixer_kernels.hydra_core import hydra_core

    parameters = [p for name, p in block.named_parameters() if not name.startswith(("in_proj", "out_proj"))]
    leaf = projected.detach().requires_grad_()
    with force_backend(backend):
        out = hydra_core(leaf, block.core_parameters(), ids)
    return [out, *torch.autograd.grad((out * cotangent).sum(), [leaf, *parameters])]


@pytest.mark.parametrize(("length", "packed", "options", "dtype"), CASES)
def test_output_and_gradients(length, packed, options, dtype, poisoned):  # noqa: F811
    block = make_block(**options)
    torch.manual_seed(1)
    width = block.in_proj.out_features
    projected = torch.randn(2, length, width).to(dtype)
    ids = packed_ids(length) if packed else None
    real = torch.ones(2, length, dtype=torch.bool) if ids is None else ids >= 0
    cotangent = torch.randn(2, length, block.d_inner) * real[..., None]
    projected, cotangent = projected.to(DEVICE), cotangent.to(DEVICE, dtype)
    ids, real = ids if ids is None else ids.to(DEVICE), real.to(DEVICE)
    wide = make_block(**options).double().to(DEVICE)
    expected = run(wide, "reference", projected.double(), cotangent.double(), ids)
    actual = run(block.to(DEVICE), "triton", projected, cotangent, ids)
    actual[0], expected[0] = actual[0] * real[..., None], expected[0] * real[..., None]
    errors = [relative_error(*pair) for pair in zip(actual, expected)]
    assert max(errors) < TOLERANCE[dtype], errors


@pytest.mark.parametrize("length", [9, 40])
def test_sizes_whose_rows_begin_anywhere(length, poisoned):  # noqa: F811
    """5 heads of 12: no slice of what is projected begins at a multiple of 16 bytes."""
    torch.manual_seed(0)
    options = {"d_model": 30, "headdim": 12, "d_state": 7}
    block, wide = Hydra(**options), Hydra(**options).double()
    wide.load_state_dict(block.state_dict())
    projected = torch.randn(2, length, block.in_proj.out_features, device=DEVICE)
    cotangent = torch.randn(2, length, block.d_inner, device=DEVICE)
    expected = run(wide.to(DEVICE), "reference", projected.double(), cotangent.double(), None)
    actual = run(block.to(DEVICE), "triton", projected, cotangent, None)
    assert max(relative_error(*pair) for pair in zip(actual, expected)) < TOLERANCE[torch.float32]


def test_long_rows_of_many_chunks(monkeypatch):
    monkeypatch.setattr(mixing, "CHUNK", 32)
    for module in (triton_gradients, triton_mix):
        monkeypatch.setattr(module, "TILING", dataclasses.replace(module.TILING, rows=16))
    block = make_block()
    projected = torch.randn(2, 70, block.in_proj.out_features, device=DEVICE)
    cotangent = torch.randn(2, 70, block.d_inner, device=DEVICE)
    for ids in (None, packed_ids(70).to(DEVICE)):
        weight = cotangent if ids is None else cotangent * (ids >= 0)[..., None]
        expected = run(make_block().double().to(DEVICE), "reference", projected.double(), weight.double(), ids)
        actual = run(block.to(DEVICE), "triton", projected, weight, ids)
        for a, e in zip(actual[1:], expected[1:]):
            assert relative_error(a, e) < 1e-4


def test_the_same_through_a_compiled_graph():
    block = make_block().to(DEVICE)
    hidden = torch.randn(2, 20, D_MODEL, device=DEVICE)
    torch._dynamo.reset()
    with force_backend("triton"):
        expected = block(hidden)
        actual = torch.compile(block, backend="aot_eager", fullgraph=True)(hidden)
        grads = [torch.autograd.grad(y.square().sum(), block.in_proj.weight)[0] for y in (expected, actual)]
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*grads)
