"""Linear recurrences: the definition against a plain loop, the chunked form and the step against the definition."""

import pytest
import torch
from anymixer_kernels import force_backend
from anymixer_kernels.linear_recurrence import (
    linear_recurrence,
    linear_recurrence_both_ways,
    linear_recurrence_both_ways_matrix,
    linear_recurrence_matrix,
    linear_recurrence_step,
)

NHEADS, HEADDIM, D_STATE = 4, 3, 5


def make(length, per_dimension, ngroups=2, strength=1.0, batch=2, dtype=torch.float64):
    torch.manual_seed(0)
    groups = NHEADS if per_dimension else ngroups
    shapes = [
        (groups, D_STATE),
        (groups, D_STATE),
        (NHEADS, HEADDIM),
        (NHEADS, D_STATE) if per_dimension else (NHEADS,),
    ]
    q, k, v, decay = (torch.randn(batch, length, *shape, dtype=dtype) for shape in shapes)
    return [q, k, v, -strength * torch.nn.functional.softplus(decay)]


def packed_ids(length):
    cut = max(1, length // 3)
    row = ([0] * cut + [1] + [2] * length)[:length]
    return torch.tensor([row, ([-1] * (length // 2) + [0] * length)[:length]])


@pytest.mark.parametrize("per_dimension", [False, True])
def test_the_definition_is_the_recurrence(per_dimension):
    q, k, v, decay = make(6, per_dimension)
    initial = torch.randn(2, NHEADS, D_STATE, HEADDIM, dtype=torch.float64)
    with force_backend("reference"):
        y, last = linear_recurrence(q, k, v, decay, initial_state=initial)
    state = initial
    for t in range(6):
        step, state = linear_recurrence_step(q[:, t], k[:, t], v[:, t], decay[:, t], state)
        torch.testing.assert_close(y[:, t], step)
    torch.testing.assert_close(last, state)
    torch.testing.assert_close(linear_recurrence_matrix(q, k, decay).triu(1), torch.zeros(2, NHEADS, 6, 6).double())


@pytest.mark.parametrize("length", [1, 15, 16, 63, 200])
@pytest.mark.parametrize("per_dimension", [False, True])
@pytest.mark.parametrize("how", ["plain", "initial state", "packed"])
@pytest.mark.parametrize("chunk_size", [16, 64])
def test_chunks_equal_the_definition_with_all_gradients(length, per_dimension, how, chunk_size):
    inputs = [t.requires_grad_() for t in make(length, per_dimension)]
    options = {"chunk_size": chunk_size}
    real = torch.ones(2, length, 1, 1, dtype=torch.bool)
    if how == "initial state":
        options["initial_state"] = torch.randn(2, NHEADS, D_STATE, HEADDIM, dtype=torch.float64)
    elif how == "packed":
        options["sequence_id"] = packed_ids(length)
        real = (options["sequence_id"] >= 0)[..., None, None]
    results = []
    for backend in ("reference", "torch"):
        with force_backend(backend):
            y, state = linear_recurrence(*inputs, **options)
        total = (y * real).square().sum() + state.square().sum()
        results.append((y * real, state, *torch.autograd.grad(total, inputs)))
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("per_dimension", [False, True])
@pytest.mark.parametrize("strength", [1e-6, 30.0])
def test_weak_and_strong_decays_stay_exact_in_float32(per_dimension, strength):
    inputs = make(150, per_dimension, strength=strength)
    expected, expected_state = linear_recurrence(*inputs)
    low = [t.float().requires_grad_() for t in inputs]
    actual, state = linear_recurrence(*low)
    for a, e in ((actual, expected), (state, expected_state)):
        assert (a.double() - e).norm() <= 1e-5 * e.norm()
    assert all(g.isfinite().all() for g in torch.autograd.grad(actual.sum(), low))


def test_gradcheck():
    inputs = [t.requires_grad_() for t in make(5, True, batch=1)]
    ids = torch.tensor([[0, 0, 1, 1, 1]])
    for backend in ("reference", "torch"):
        with force_backend(backend):
            assert torch.autograd.gradcheck(
                lambda *a: linear_recurrence(*a, sequence_id=ids)[0], inputs, eps=1e-6, atol=1e-6
            )


def both_ways_entry_by_entry(q, k, log_decay, ids):
    """M as sums and products over pairs of tokens, in plain loops."""
    batch, length = q.shape[:2]
    q, k = (t.repeat_interleave(NHEADS // t.shape[2], dim=2) for t in (q, k))
    decay = log_decay.exp() if log_decay.dim() == 4 else log_decay.exp()[..., None].expand(-1, -1, -1, D_STATE)
    matrix = torch.zeros(batch, NHEADS, length, length, dtype=q.dtype)
    for b in range(batch):
        for t in range(length):
            for s in range(length):
                if ids is not None and (ids[b, t] != ids[b, s] or ids[b, s] < 0):
                    continue
                # The decays of all tokens after s on the way to t, with t's own.
                passed = decay[b, s + 1 : t + 1] if s <= t else decay[b, t:s]
                matrix[b, :, t, s] = (q[b, t] * k[b, s] * passed.prod(0)).sum(-1)
    return matrix


@pytest.mark.parametrize("per_dimension", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_both_ways_count_a_token_s_own_part_once(per_dimension, packed):
    q, k, v, decay = make(11, per_dimension)
    ids = packed_ids(11) if packed else None
    matrix = both_ways_entry_by_entry(q, k, decay, ids)
    torch.testing.assert_close(linear_recurrence_both_ways_matrix(q, k, decay, ids), matrix)
    expected = (matrix @ v.transpose(1, 2)).transpose(1, 2)
    real = 1 if ids is None else (ids >= 0)[..., None, None]
    for backend in ("reference", "torch"):
        with force_backend(backend):
            actual = linear_recurrence_both_ways(q, k, v, decay, sequence_id=ids)
        torch.testing.assert_close(actual * real, expected * real)


@pytest.mark.parametrize("length", [1, 16, 63, 200])
@pytest.mark.parametrize("packed", [False, True])
def test_both_ways_in_chunks_equal_the_definition_with_all_gradients(length, packed):
    inputs = [t.requires_grad_() for t in make(length, True)]
    ids = packed_ids(length) if packed else None
    real = 1 if ids is None else (ids >= 0)[..., None, None]
    results = []
    for backend in ("reference", "torch"):
        with force_backend(backend):
            y = linear_recurrence_both_ways(*inputs, sequence_id=ids) * real
        results.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_a_state_and_sequences_exclude_each_other():
    state = torch.zeros(2, NHEADS, D_STATE, HEADDIM)
    with pytest.raises(ValueError, match="initial_state"):
        linear_recurrence(*make(4, False), initial_state=state, sequence_id=torch.zeros(2, 4))
