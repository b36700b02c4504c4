"""The Triton form of quasiseparable mixing against the definition in float64."""

import dataclasses
import itertools

import pytest
import torch
from anymixer_kernels import force_backend
from anymixer_kernels.quasiseparable import QuasiseparableInputs, quasiseparable
from anymixer_kernels.quasiseparable.limits import no_triton_form_of_size
from torch.nn.functional import softplus
from triton_cases import DEVICE, ON_GPU, TOLERANCE, needs_triton, packed_ids, poisoned, relative_error  # noqa: F401

pytestmark = needs_triton
NAMES = ("x", "dt_f", "dt_b", "A", "B_f", "B_b", "C_f", "C_b", "diagonal")
SIZES = {"nheads": 4, "headdim": 64, "d_state": 64} if ON_GPU else {"nheads": 4, "headdim": 16, "d_state": 16}
# Length, ngroups, packed, dtype; few where every program runs in Python. One chunk is at most 128 tokens.
CASES = (
    list(itertools.product((1, 2, 63, 127, 128, 500, 4097), (1, 2), (False, True), (torch.float32, torch.bfloat16)))
    if ON_GPU
    else [
        (1, 1, False, torch.float32),
        (2, 1, False, torch.float32),
        (17, 2, True, torch.float32),
        (64, 1, False, torch.float32),
        (64, 2, True, torch.bfloat16),
        (150, 1, False, torch.float32),
        (150, 2, True, torch.float32),
    ]
)


def make_inputs(length, batch=2, ngroups=1, nheads=4, headdim=16, d_state=16, step=-1.0, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    steps = [softplus(normal(batch, length, nheads) + step) for _ in range(2)]
    projections = [normal(batch, length, ngroups, d_state) / d_state**0.5 for _ in range(4)]
    A = -torch.exp(normal(nheads))
    return [normal(batch, length, nheads, headdim), *steps, A, *projections, normal(batch, length, nheads)]


def both_ways(inputs, dtype, ids=None):
    """{name: (by Triton in `dtype`, by the reference in float64)} of the output and every gradient."""
    real = torch.ones(inputs[0].shape[:2], dtype=torch.bool) if ids is None else ids >= 0
    torch.manual_seed(1)
    cotangent = torch.randn(inputs[0].shape, dtype=torch.float64) * real[..., None, None]
    narrow = [t.to(DEVICE, torch.float32 if name in ("dt_f", "dt_b", "A") else dtype) for name, t in zip(NAMES, inputs)]
    results = []
    # The reference reads what the narrow type holds, so that the error is the computation's alone.
    for backend, tensors in (("triton", narrow), ("reference", [t.double() for t in narrow])):
        leaves = [t.requires_grad_() for t in tensors]
        x, dt_f, dt_b, A, B_f, B_b, C_f, C_b, diagonal = leaves
        sequence_id = None if ids is None else ids.to(x.device)
        bundle = QuasiseparableInputs(x, (dt_f, dt_b), A, (B_f, B_b), (C_f, C_b), diagonal, sequence_id)
        with force_backend(backend):
            y = quasiseparable(bundle)
        weight = cotangent.to(y.device, y.dtype)
        grads = torch.autograd.grad((y * weight).sum(), leaves)
        results.append([y * real[..., None, None].to(y.device), *grads])
    return {name: pair for name, pair in zip(("y", *NAMES), zip(*results))}


def check(results, dtype):
    errors = {name: relative_error(*pair) for name, pair in results.items()}
    assert max(errors.values()) < TOLERANCE[dtype], errors


@pytest.mark.parametrize(("length", "ngroups", "packed", "dtype"), CASES)
def test_output_and_gradients(length, ngroups, packed, dtype, poisoned):  # noqa: F811
    ids = packed_ids(length) if packed else None
    check(both_ways(make_inputs(length, ngroups=ngroups, **SIZES), dtype, ids), dtype)


@pytest.mark.parametrize("packed", [False, True])
def test_more_chunks_than_are_carried_at_once(packed, poisoned):  # noqa: F811
    """Six: four, and two."""
    inputs, ids = make_inputs(643, batch=1, **SIZES | {"nheads": 2}), packed_ids(643)[:1] if packed else None
    check(both_ways(inputs, torch.float32, ids), torch.float32)


@pytest.fixture
def small_blocks(monkeypatch):
    """Chunks of 32 tokens are two blocks of 16."""
    from anymixer_kernels.quasiseparable import triton_gradients, triton_mix

    for module in (triton_gradients, triton_mix):
        monkeypatch.setattr(module, "TILING", dataclasses.replace(module.TILING, rows=16))


@pytest.mark.parametrize(("ngroups", "packed"), [(1, False), (2, True)])
def test_chunks_of_two_blocks(ngroups, packed, small_blocks, poisoned):  # noqa: F811
    ids = packed_ids(31) if packed else None
    check(both_ways(make_inputs(31, ngroups=ngroups, **SIZES), torch.float32, ids), torch.float32)


@pytest.mark.parametrize("step", [-12.0, 6.0])
def test_tiny_and_large_steps_between_blocks(step, small_blocks):
    """No pair of two blocks weighs more than its step, however large the decay on the way."""
    results = both_ways(make_inputs(32, step=step, **SIZES), torch.float32)
    assert relative_error(*results.pop("A")) < 1e-3
    check(results, torch.float32)


@pytest.mark.parametrize("step", [-12.0, 6.0])
def test_tiny_and_large_steps(step):
    """Steps of 6e-6, and of 6 with decays that underflow, whose gradients of A nearly cancel: float32 keeps 1.5e-4
    of them, here as in the PyTorch form."""
    results = both_ways(make_inputs(40, step=step, **SIZES), torch.float32)
    assert relative_error(*results.pop("A")) < 1e-3
    check(results, torch.float32)


def test_inputs_that_are_slices():
    inputs = make_inputs(33, **SIZES)
    wide = torch.cat([t.flatten(2) for t in inputs[4:8]], dim=-1)
    parts = [t.unflatten(-1, (1, SIZES["d_state"])) for t in wide.split(SIZES["d_state"], dim=-1)]
    assert not parts[1].is_contiguous()
    inputs[0] = inputs[0].transpose(2, 3).contiguous().transpose(2, 3)
    check(both_ways([*inputs[:4], *parts, inputs[8]], torch.float32), torch.float32)


def test_states_wider_than_a_head_in_rows_of_one_chunk():
    check(both_ways(make_inputs(20, nheads=2, headdim=16, d_state=192), torch.bfloat16), torch.bfloat16)
    with pytest.raises(RuntimeError, match="d_state above 128 in rows of more than 128 tokens"):
        both_ways(make_inputs(129, nheads=1, headdim=16, d_state=192), torch.bfloat16)


@pytest.mark.parametrize(
    ("length", "headdim", "d_state", "narrow", "wide"),
    [
        (128, 128, 128, True, True),
        (129, 64, 128, True, True),
        (129, 128, 64, True, True),
        (129, 128, 128, True, False),
        (128, 64, 192, True, False),
        (129, 64, 192, False, False),
        (128, 129, 64, False, False),
    ],
)
def test_sizes_that_fit_on_chip(length, headdim, d_state, narrow, wide):
    """In bfloat16, and in float32: what shared memory of 227 KiB takes, as compiled for an H100."""
    for dtype, fits in ((torch.bfloat16, narrow), (torch.float32, wide)):
        assert (no_triton_form_of_size(length, headdim, d_state, dtype) is None) == fits


def test_float32_sizes_that_do_not_fit_are_refused():
    with pytest.raises(RuntimeError, match="has no form for d_state above 128 in float32"):
        both_ways(make_inputs(20, nheads=1, headdim=16, d_state=192), torch.float32)
