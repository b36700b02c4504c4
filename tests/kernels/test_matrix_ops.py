"""Cauchy, Vandermonde and Toeplitz mixing: the definitions against plain loops, the fast forms against the
definitions."""

import math

import pytest
import torch
from anymixer_kernels import blockwise, force_backend
from anymixer_kernels.cauchy import cauchy_matrix, cauchy_mix
from anymixer_kernels.low_rank import low_rank_matrix, low_rank_mix
from anymixer_kernels.low_rank import torch_form as low_rank_fast
from anymixer_kernels.toeplitz import toeplitz_matrix, toeplitz_mix
from anymixer_kernels.toeplitz import torch_form as toeplitz_fast
from anymixer_kernels.vandermonde import vandermonde_matrix, vandermonde_mix

NHEADS, QK_DIM, HEADDIM = 2, 3, 4


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def packed_ids(batch, length):
    """A sequence, one of a single token, another, and padding."""
    cut = max(1, length // 3)
    row = ([0] * cut + [1] + [2] * length)[:length]
    if length > 6:
        row[-2:] = [-1, -1]
    return torch.tensor([row] * batch)


def cauchy(q, k, v, ids):
    return cauchy_mix(q, k, v, torch.tensor(0.7, dtype=torch.float64), ids)


def vandermonde(q, k, v, ids):
    return vandermonde_mix(q, k, v, 0.01, ids)


def toeplitz(q, k, v, ids):
    return toeplitz_mix(q[..., 0], k[..., 0], v, ids)


def shared_toeplitz(q, k, v, ids):
    return toeplitz_mix(q[0, ..., 0], k[0, ..., 0], v, ids)


def low_rank(q, k, v, ids):
    return low_rank_mix(q, k, v, ids)


OPS = [cauchy, vandermonde, toeplitz, shared_toeplitz, low_rank]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("length", [1, 2, 17, 63, 130])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("small_blocks", [False, True])
def test_fast_form_equals_reference_with_all_gradients(op, length, packed, small_blocks, monkeypatch):
    torch.manual_seed(0)
    if small_blocks:  # heads apart, Fourier transforms, and recurrences
        monkeypatch.setattr(blockwise, "BLOCK_ENTRIES", {"cpu": 1})
        monkeypatch.setattr(toeplitz_fast, "DENSE_LENGTH", 0)
        monkeypatch.setattr(low_rank_fast, "BLOCKS_LENGTH", 0)
    batch = 3
    q, k = (normal(batch, length, NHEADS, QK_DIM).requires_grad_() for _ in range(2))
    v = normal(batch, length, NHEADS, HEADDIM)
    ids = packed_ids(batch, length) if packed else None
    real = torch.ones(batch, length, dtype=torch.bool) if ids is None else ids >= 0
    v = (v * real[..., None, None]).requires_grad_()
    cotangent = normal(*v.shape) * real[..., None, None]

    def run(backend):
        with force_backend(backend):
            y = op(q, k, v, ids)
        return y * real[..., None, None], torch.autograd.grad((y * cotangent).sum(), [q, k, v])

    (expected, expected_grads), (actual, actual_grads) = run("reference"), run("torch")
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
    for a, e in zip(actual_grads, expected_grads):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("op", OPS)
def test_packed_sequences_are_mixed_as_if_alone(op):
    torch.manual_seed(0)
    q, k, v = normal(1, 10, NHEADS, QK_DIM), normal(1, 10, NHEADS, QK_DIM), normal(1, 10, NHEADS, HEADDIM)
    ids = torch.tensor([[0, 0, 0, 0, 1, 2, 2, 2, 2, 2]])
    together = op(q, k, v, ids)
    for start, end in ((0, 4), (4, 5), (5, 10)):
        part = slice(start, end)
        factors = (q[:, : end - start], k[:, : end - start]) if op is shared_toeplitz else (q[:, part], k[:, part])
        torch.testing.assert_close(together[:, part], op(*factors, v[:, part], None), rtol=1e-10, atol=1e-12)


def test_matrices_are_their_formulas_entry_by_entry():
    torch.manual_seed(0)
    q, k = normal(1, 4, 1, QK_DIM), normal(1, 4, 1, QK_DIM)
    matrices = {
        "cauchy": cauchy_matrix(q, k, torch.tensor(0.7)),
        "vandermonde": vandermonde_matrix(q, k, 0.1),
        "toeplitz": toeplitz_matrix(q[..., 0], k[..., 0], 1),
        "low_rank": low_rank_matrix(q, k),
    }
    for t in range(4):
        for s in range(4):
            row, column = q[0, t, 0].tolist(), k[0, s, 0].tolist()
            expected = {
                "cauchy": sum(1 / (math.exp(a) + math.exp(b) + 0.7) for a, b in zip(row, column)),
                "vandermonde": sum(
                    math.cos(0.2 * math.pi * a * s) - math.cos(0.2 * math.pi * b * t) for a, b in zip(row, column)
                ),
                "low_rank": sum(a * b for a, b in zip(row, column)),
                "toeplitz": float(q[0, t - s, 0, 0] if t >= s else k[0, s - t, 0, 0]),
            }
            for name, value in expected.items():
                assert float(matrices[name][0, 0, t, s]) == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize("op", OPS)
def test_no_tensor_is_larger_than_the_matrix(op):
    """Neither a [.., length, length, qk_dim] tensor nor, with blocks, a whole matrix is made."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    batch, length, width = 64, 32, 16
    q, k = (normal(batch, length, NHEADS, width).requires_grad_() for _ in range(2))
    v = normal(batch, length, NHEADS, HEADDIM).requires_grad_()
    matrix = batch * NHEADS * length * length
    with pytest.MonkeyPatch.context() as patch, Watch():
        patch.setattr(blockwise, "BLOCK_ENTRIES", {"cpu": matrix // 8})
        op(q, k, v, None).sum().backward()
    assert largest < matrix
