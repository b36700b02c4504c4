"""Time-invariant systems: every fast form against the definition, kernels against sums of exponentials."""

import dataclasses

import numpy as np
import pytest
import torch
from anymixer_kernels import force_backend
from anymixer_kernels.lti import (
    DenseSystem,
    DiagonalSystem,
    LowRankSystem,
    lti_mix,
    state_space_mix,
    state_space_scan,
    systems,
)
from torch.overrides import TorchFunctionMode

CHANNELS = 3
F64 = {"dtype": torch.float64}


def diagonal(dtype=torch.float64, modes=4, real=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(CHANNELS, modes, generator=g, **F64)  # noqa: E731
    parts = [-draw().exp() * 0.1, draw(), *([] if real else [draw(), draw()])]
    return DiagonalSystem(*[p.to(dtype).requires_grad_() for p in parts])


def dense(width=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(CHANNELS, width, width, generator=g, **F64)
    a = 0.95 * a / torch.linalg.matrix_norm(a, 2)[:, None, None]
    return DenseSystem(a.requires_grad_(), *[torch.randn(CHANNELS, width, generator=g, **F64) for _ in range(2)])


def low_rank(cauchy=True, rank=1, seed=0, dense_step=False):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(CHANNELS, *shape, generator=g, **F64).requires_grad_()  # noqa: E731
    re = -draw(3).detach().exp() * 0.1
    return LowRankSystem(re, draw(3), draw(rank, 6), draw(6), draw(6), cauchy, dense_step)


SYSTEMS = {
    "complex": diagonal,
    "real": lambda **k: diagonal(real=True, **k),
    "dense": dense,
    "cauchy": low_rank,
    "rank 2": lambda: low_rank(rank=2),
    "powers": lambda: low_rank(cauchy=False),
}


def packed(length):
    ids = torch.zeros(2, length, dtype=torch.long)
    ids[0, length // 3 :] = 1
    ids[0, -(length // 5) :] = -1
    ids[1, : length // 4] = -1
    ids[1, length // 4 + length // 3 :] = 7
    return ids


def both(function, inputs):
    """Results and gradients by the definition, and by the fast form."""
    for backend in ("reference", "torch"):
        with force_backend(backend):
            out = function()
        yield (out, *torch.autograd.grad(out.sin().sum(), inputs, allow_unused=True))


@pytest.mark.parametrize("length", [1, 2, 33, 128, 200])
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("two_sided", [False, True])
def test_forms_equal_the_definition_with_all_gradients(length, is_packed, two_sided):
    torch.manual_seed(0)
    below, above = (torch.randn(CHANNELS, length, **F64, requires_grad=True) for _ in range(2))
    v = torch.randn(2, length, CHANNELS, **F64, requires_grad=True)
    later, ids = above if two_sided else None, packed(length) if is_packed else None
    inputs = (below, v, above) if two_sided else (below, v)
    expected, actual = both(lambda: lti_mix(below, v, later, ids), inputs)
    for e, a in zip(expected, actual):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


def test_the_definition_is_the_sum_it_says():
    below, above = torch.tensor([[1.0, 10.0, 100.0]]), torch.tensor([[2.0, 20.0, 200.0]])
    v = torch.tensor([[[1.0], [2.0], [3.0]]])
    with force_backend("reference"):
        y = lti_mix(below, v, above)
    assert y[0, :, 0].tolist() == [1 + 2 * 2 + 20 * 3, 10 * 1 + 2 + 2 * 3, 100 + 10 * 2 + 3]


@pytest.mark.parametrize("kind", SYSTEMS)
@pytest.mark.parametrize("length", [1, 2, 5, 40])
def test_kernels_are_the_response_to_an_impulse(kind, length):
    system = SYSTEMS[kind]()
    impulse = torch.zeros(1, length, CHANNELS, **F64)
    impulse[:, 0] = 1
    with force_backend("reference"):
        response, _ = state_space_scan(system, impulse)
    torch.testing.assert_close(system.kernel(length), response[0].T, rtol=1e-10, atol=1e-12)


def test_complex_modes_are_damped_cosines():
    system = diagonal()
    rate = system.log_decay.detach().numpy() + 1j * system.angle.detach().numpy()
    weight = system.weight.detach().numpy() + 1j * system.weight_im.detach().numpy()
    expected = np.einsum("hn,hnl->hl", weight, np.exp(rate[..., None] * np.arange(50))).real
    np.testing.assert_allclose(system.kernel(50).detach().numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", SYSTEMS)
@pytest.mark.parametrize("length", [1, 63, 64, 150])
@pytest.mark.parametrize("how", ["plain", "initial state", "packed"])
def test_scan_equals_token_by_token(kind, length, how):
    system = SYSTEMS[kind]()
    torch.manual_seed(1)
    v = torch.randn(2, length, CHANNELS, **F64)
    options = {}
    if how == "initial state":
        options["initial_state"] = torch.randn(2, CHANNELS, system.width, **F64)
    elif how == "packed":
        options["sequence_id"] = packed(length)
        options["sequence_id"][0, -1] = 9  # so that one row ends in a sequence of its own
    with force_backend("reference"):
        expected, last = state_space_scan(system, v, **options)
    actual, state = state_space_scan(system, v, **options)
    real = options["sequence_id"] >= 0 if how == "packed" else torch.ones(2, length, dtype=torch.bool)
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(state[real[:, -1]], last[real[:, -1]], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("later", [None, diagonal(seed=5)])
def test_long_packed_rows_are_scanned(later, monkeypatch):
    system = diagonal()
    v = torch.randn(2, 150, CHANNELS, **F64, requires_grad=True)
    ids = packed(150)
    whole = state_space_mix(system, v, later, ids)
    monkeypatch.setattr("anymixer_kernels.lti.SCAN_LENGTH", 100)
    scanned = state_space_mix(system, v, later, ids)
    real = ids >= 0
    torch.testing.assert_close(scanned[real], whole[real], rtol=1e-9, atol=1e-10)
    gradients = [torch.autograd.grad(y[real].sin().sum(), (v, system.angle)) for y in (whole, scanned)]
    for expected, actual in zip(*gradients):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 2])
def test_low_rank_system_is_the_bilinear_rule_of_its_matrix(rank):
    system = low_rank(rank=rank)
    re, im, P = torch.diag_embed(system.re), torch.diag_embed(system.im), system.P
    A = torch.cat([torch.cat([re, -im], 2), torch.cat([im, re], 2)], 1) - 2 * P.transpose(1, 2) @ P
    one = torch.eye(6, **F64)
    dense = system.dense()
    torch.testing.assert_close(dense.A, torch.linalg.solve(one - A / 2, one + A / 2))
    torch.testing.assert_close(dense.B, torch.linalg.solve(one - A / 2, system.B))
    u, state = torch.randn(2, CHANNELS, **F64), torch.randn(2, CHANNELS, 6, **F64)
    for actual, expected in zip(system.step(u, state), low_rank(rank=rank, dense_step=True).step(u, state)):
        torch.testing.assert_close(actual, expected)


class RoundedProducts(TorchFunctionMode):
    """What a GPU may do with products of float32: their factors have 10 bits after the first (TF32)."""

    PRODUCTS = (torch.matmul, torch.bmm, torch.einsum, torch.Tensor.matmul, torch.Tensor.__matmul__)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.PRODUCTS:
            args = [self.rounded(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
        return func(*args, **(kwargs or {}))

    def rounded(self, factor):
        if factor.dtype != torch.float32:
            return factor
        bits = factor.contiguous().view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("kind", SYSTEMS)
@torch.no_grad()
def test_rounded_products_of_a_device_leave_kernels_and_tables_alone(kind, monkeypatch):
    monkeypatch.setattr(systems, "ROUNDING_DEVICES", ("cpu",))
    system = SYSTEMS[kind]()
    tensors = {key: x.float() for key, x in vars(system).items() if isinstance(x, torch.Tensor)}
    system = dataclasses.replace(system, **tensors)

    def results():
        state = torch.arange(1.0, 1 + CHANNELS * system.width).view(1, CHANNELS, system.width)
        tables = [system.kernel(100), system.gathers(9), system.reads(9)]
        # A dense A is multiplied by states, which are read once.
        return tables if kind == "dense" else [*tables, *system.step(torch.ones(1, CHANNELS), state)]

    expected = results()
    with RoundedProducts():
        assert not torch.equal(torch.ones(1, 1) @ torch.full((1, 1), 1 + 2.0**-12), torch.full((1, 1), 1 + 2.0**-12))
        found = results()
    for e, f in zip(expected, found):
        assert f.dtype == torch.float32 and torch.equal(f, e)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", SYSTEMS)
@torch.no_grad()
def test_kernels_on_a_gpu_that_may_round_products(kind, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    system = SYSTEMS[kind]()
    tensors = {key: x.float().cuda() for key, x in vars(system).items() if isinstance(x, torch.Tensor)}
    expected, found = system.kernel(1000), dataclasses.replace(system, **tensors).kernel(1000).cpu()
    assert found.dtype == torch.float32 and (found - expected).norm() < 1e-5 * expected.norm()
