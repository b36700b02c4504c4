"""The fast form of quasiseparable mixing against its definition, and the definition against plain loops."""

import dataclasses
import math

import pytest
import torch
from anymixer_kernels import force_backend
from anymixer_kernels.quasiseparable import QuasiseparableInputs, quasiseparable, quasiseparable_matrix
from anymixer_kernels.quasiseparable import torch_form as fast
from torch.nn.functional import softplus


def make_inputs(batch=2, length=9, nheads=4, headdim=3, ngroups=2, d_state=5, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    x = normal(batch, length, nheads, headdim)
    dt = (softplus(normal(batch, length, nheads) - 1), softplus(normal(batch, length, nheads) - 1))
    A = -torch.exp(normal(nheads))
    B, C = ((normal(batch, length, ngroups, d_state), normal(batch, length, ngroups, d_state)) for _ in "BC")
    return [x, *dt, A, *B, *C, normal(batch, length, nheads)]


def bundle(inputs, **options):
    x, dt_f, dt_b, A, B_f, B_b, C_f, C_b, diagonal = inputs
    return QuasiseparableInputs(x, (dt_f, dt_b), A, (B_f, B_b), (C_f, C_b), diagonal, **options)


def mix(inputs, chunk_size=256, **options):
    return quasiseparable(bundle(inputs, **options), chunk_size=chunk_size)


def packed_ids(batch, length, seed=0):
    """Three sequences a row, one of them of length 1, and padding at the end."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(batch):
        cut = int(torch.randint(1, max(2, length // 2), (1,), generator=g))
        pad = min(2, length - cut - 1) if length > 2 else 0
        row = [0] * cut + [1] + [2] * (length - cut - 1 - pad) + [-1] * pad
        rows.append(row[:length])
    return torch.tensor(rows)


def test_matrix_is_the_formula_entry_by_entry():
    inputs = make_inputs(batch=1, length=6)
    x, dt_f, dt_b, A, B_f, B_b, C_f, C_b, diagonal = inputs
    ids = torch.tensor([[0, 0, 1, 1, 1, -1]])
    matrix = quasiseparable_matrix(bundle(inputs, sequence_id=ids))
    for h in range(4):
        for t in range(6):
            for s in range(6):
                expected = 0.0
                if ids[0, t] == ids[0, s] >= 0:
                    if s < t:
                        decay = math.exp(A[h] * sum(dt_f[0, r, h] for r in range(s + 1, t)))
                        expected = float(C_f[0, t - 1, h // 2] @ B_f[0, s, h // 2]) * decay * dt_f[0, s, h]
                    elif s > t:
                        decay = math.exp(A[h] * sum(dt_b[0, r, h] for r in range(t + 1, s)))
                        expected = float(C_b[0, t + 1, h // 2] @ B_b[0, s, h // 2]) * decay * dt_b[0, s, h]
                    else:
                        expected = diagonal[0, t, h]
                assert float(matrix[0, h, t, s]) == pytest.approx(float(expected), rel=1e-12, abs=1e-12)


def test_without_shift_the_matrix_is_the_sum_of_two_scans():
    inputs = make_inputs(batch=1, length=6)
    x, dt_f, dt_b, A, B_f, B_b, C_f, C_b, _ = inputs
    bare = dataclasses.replace(bundle(inputs), diagonal=None, shift=False)
    expected = torch.zeros_like(x)
    for places, dt, B, C in ((range(6), dt_f, B_f, C_f), (range(5, -1, -1), dt_b, B_b, C_b)):
        for h in range(4):
            state = torch.zeros(3, 5, dtype=torch.float64)
            for t in places:
                step = dt[0, t, h]
                state = torch.exp(step * A[h]) * state + step * torch.outer(x[0, t, h], B[0, t, h // 2])
                expected[0, t, h] += state @ C[0, t, h // 2]
    for backend in ("reference", "torch"):
        with force_backend(backend):
            torch.testing.assert_close(quasiseparable(bare), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 17, 63, 200])
@pytest.mark.parametrize("ngroups", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("one_chunk", [True, False])
@pytest.mark.parametrize("shift", [True, False])
def test_fast_form_equals_reference_with_all_gradients(length, ngroups, packed, one_chunk, shift, monkeypatch):
    monkeypatch.setattr(fast, "DENSE_LENGTH", {"cpu": 10**6 if one_chunk else 0})
    inputs = [t.requires_grad_() for t in make_inputs(length=length, ngroups=ngroups)]
    state = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    ids = packed_ids(2, length) if packed else None
    real = torch.ones(2, length, dtype=torch.bool) if ids is None else ids >= 0
    cotangent = torch.randn(2, length, 4, 3, dtype=torch.float64) * real[..., None, None]

    def run(backend):
        with force_backend(backend):
            y = mix(inputs, sequence_id=ids, initial_state=state, shift=shift, chunk_size=16)
        return y * real[..., None, None], torch.autograd.grad((y * cotangent).sum(), [*inputs, state])

    expected, expected_grads = run("reference")
    actual, actual_grads = run("torch")
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    for a, e in zip(actual_grads, expected_grads):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)


def test_gradcheck_of_reference_and_fast_form(monkeypatch):
    inputs = [t.requires_grad_() for t in make_inputs(batch=1, length=5, nheads=2, headdim=2, d_state=2)]
    ids = torch.tensor([[0, 0, 0, 1, 1]])
    for backend, limit in (("reference", 0), ("torch", 100), ("torch", 0)):
        monkeypatch.setattr(fast, "DENSE_LENGTH", {"cpu": limit})
        with force_backend(backend):
            assert torch.autograd.gradcheck(
                lambda *args: mix(args, sequence_id=ids, chunk_size=2), inputs, eps=1e-6, atol=1e-6
            )


@pytest.mark.parametrize("scale", [1e-6, 1e3])
def test_tiny_and_huge_steps_stay_finite(scale):
    inputs = make_inputs(length=300, dtype=torch.float32)
    inputs[1], inputs[2] = inputs[1] * scale, inputs[2] * scale
    inputs = [t.requires_grad_() for t in inputs]
    y = mix(inputs, chunk_size=32)
    assert y.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), inputs))


def test_a_step_size_of_zero_adds_nothing():
    inputs = make_inputs(dtype=torch.float32)
    inputs[1][:, 3] = 0.0
    with force_backend("reference"):
        expected = mix(inputs)
    torch.testing.assert_close(mix(inputs), expected, rtol=1e-5, atol=1e-6)


def test_garbage_in_padding_changes_nothing():
    inputs, ids = make_inputs(length=12), packed_ids(2, 12)
    clean = mix(inputs, sequence_id=ids)
    inputs[0][ids < 0] = float("nan")
    torch.testing.assert_close(mix(inputs, sequence_id=ids)[ids >= 0], clean[ids >= 0], rtol=0, atol=0)


def test_bfloat16_stays_close():
    inputs = make_inputs(length=64, dtype=torch.float32)
    expected = mix(inputs)
    inputs = [t.bfloat16() if i in (0, 4, 5, 6, 7) else t for i, t in enumerate(inputs)]
    actual = mix(inputs)
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).norm() / expected.norm() < 2e-2


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="unknown backend 'tritn'"), force_backend("tritn"):
        pass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("length", [1, 63, 128, 500, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_agrees_with_the_float64_reference(length, dtype):
    inputs = [t.requires_grad_() for t in make_inputs(length=length, nheads=4, headdim=64, d_state=64)]
    ids = packed_ids(2, length)
    real = (ids >= 0)[..., None, None]
    cotangent = torch.randn(2, length, 4, 64, dtype=torch.float64) * real
    with force_backend("reference"):
        expected = mix(inputs, sequence_id=ids)
    expected_grads = torch.autograd.grad((expected * cotangent).sum(), inputs)
    low = [i in (0, 4, 5, 6, 7) for i in range(len(inputs))]
    on_gpu = [
        t.detach().to("cuda", dtype if is_low else torch.float32).requires_grad_() for t, is_low in zip(inputs, low)
    ]
    actual = mix(on_gpu, sequence_id=ids.cuda())
    actual_grads = torch.autograd.grad((actual * cotangent.cuda()).sum(), on_gpu)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for a, e in [(actual * real.cuda(), expected * real), *zip(actual_grads, expected_grads)]:
        error = (a.double().cpu() - e).norm() / e.norm().clamp(min=1e-9)
        assert error < tolerance
