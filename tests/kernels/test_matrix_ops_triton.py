"""The Triton forms of Cauchy, Vandermonde, Toeplitz and low-rank mixing against their definitions in float64, and the
blocks around them."""

import pytest
import torch
from anymixer_kernels import force_backend
from anymixer_kernels.cauchy import cauchy_mix
from anymixer_kernels.low_rank import low_rank_mix
from anymixer_kernels.toeplitz import toeplitz_mix
from anymixer_kernels.vandermonde import vandermonde_mix
from triton_cases import DEVICE, ON_GPU, TOLERANCE, most_of_the_gpu, needs_triton, poisoned, relative_error  # noqa: F401

from anymixer.layers.packing import make_packing
from anymixer.mixers import build_mixer

pytestmark = needs_triton
# `poisoned` is a fixture.
__all__ = ["poisoned"]

BATCH, NHEADS, QK_DIM, HEADDIM = 2, 2, 3, 20


def cauchy(q, k, v, ids, **options):
    return cauchy_mix(q, k, v, torch.tensor(0.7, dtype=q.dtype, device=q.device), ids, **options)


def vandermonde(q, k, v, ids, **options):
    return vandermonde_mix(q, k, v, 0.01, ids, **options)


def toeplitz(q, k, v, ids, **options):
    return toeplitz_mix(q[..., 0], k[..., 0], v, ids, **options)


def shared_toeplitz(q, k, v, ids, **options):
    return toeplitz_mix(q[0, ..., 0], k[0, ..., 0], v, ids, **options)


def low_rank(q, k, v, ids, **options):
    return low_rank_mix(q, k, v, ids, **options)


OPS = [cauchy, vandermonde, toeplitz, shared_toeplitz, low_rank]


def packed_ids(length):
    """A row of a sequence, one of a single token, another, and padding; and a row of one between padding."""
    cut = max(1, length // 3)
    mixed = ([0] * cut + [1] + [2] * length)[:length]
    alone = [0] * length
    if length > 6:
        mixed[-2:], alone[:2], alone[-1:] = [-1, -1], [-1, -1], [-1]
    return torch.tensor([mixed, alone], device=DEVICE)


def inputs_of(length, dtype, qk_dim=QK_DIM, batch=BATCH):
    """q, k, v as slices of one projection, and a cotangent; all rounded to dtype, in float64."""
    widths = [NHEADS * HEADDIM, NHEADS * qk_dim, NHEADS * qk_dim]
    projected = torch.randn(batch, length, sum(widths), device=DEVICE).to(dtype).double()
    v, q, k = (t.unflatten(-1, (NHEADS, -1)) for t in projected.split(widths, dim=-1))
    return q, k, v, torch.randn(batch, length, NHEADS, HEADDIM, device=DEVICE).to(dtype).double()


def run(op, backend, dtype, inputs, ids, **options):
    """The output and the gradients of q, k and v, which stay slices of a wider tensor."""
    *factors, cotangent = inputs
    widths = [t.shape[-1] * NHEADS for t in factors]
    wide = torch.cat([t.flatten(-2) for t in factors], dim=-1).to(dtype)
    leaves = [t.unflatten(-1, (NHEADS, -1)).requires_grad_() for t in wide.split(widths, dim=-1)]
    options = {name: o.to(dtype) if torch.is_tensor(o) and o.is_floating_point() else o for name, o in options.items()}
    with force_backend(backend):
        y = op(*leaves, ids, **options)
    assert y.dtype == dtype
    return [y, *torch.autograd.grad(y, leaves, cotangent.to(dtype))]


def check(op, dtype, inputs, ids, **options):
    expected = run(op, "reference", torch.float64, inputs, ids, **options)
    actual = run(op, "triton", dtype, inputs, ids, **options)
    for name, a, e in zip(("y", "q", "k", "v"), actual, expected):
        assert relative_error(a, e) < TOLERANCE[dtype], name


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("length", [1, 2, 35, 63, 127, 128, 500] if ON_GPU else [1, 2, 35])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_every_gradient(op, length, packed, dtype, poisoned):
    if not ON_GPU and dtype == torch.bfloat16 and length < 35:
        pytest.skip("the interpreter computes in float32 in any case")
    torch.manual_seed(0)
    ids = packed_ids(length) if packed else None
    scale = torch.rand(BATCH, length, device=DEVICE).bfloat16().double() if packed else 0.3
    check(op, dtype, inputs_of(length, dtype), ids, scale=scale, residual=packed)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("length, blocks, packed", [(40, (16, 32), True), (70, (64, 128), False)])
@pytest.mark.skipif(ON_GPU, reason="the GPU has its own tiles, at lengths that need them")
def test_tiles_of_other_sizes(op, length, blocks, packed, monkeypatch):
    from anymixer_kernels import triton_factored
    from anymixer_kernels.toeplitz import triton_form

    monkeypatch.setattr(triton_factored, "FLOAT32_TILE", blocks)
    monkeypatch.setattr(triton_form, "LAG_PROGRAMS", 3)
    for module in (triton_factored, triton_form):
        monkeypatch.setattr(module, "MAX_HEADDIM_BLOCK", 16)
    torch.manual_seed(0)
    check(op, torch.float32, inputs_of(length, torch.float32), packed_ids(length) if packed else None, residual=True)


@pytest.mark.parametrize("op", OPS)
def test_tiles_of_other_sequences_are_not_visited(op):
    """Two sequences that fill whole tiles: the other one's NaN would go through a mask as 0 times NaN."""
    torch.manual_seed(0)
    length = 256 if ON_GPU else 64
    q, k, v, cotangent = inputs_of(length, torch.float32)
    own = torch.arange(length, device=DEVICE) < length // 2
    ids = torch.where(own, 0, 1).expand(BATCH, -1).contiguous()
    alone = [t[:, own] for t in (q, k, v, cotangent)]
    v[:, ~own] = cotangent[:, ~own] = torch.nan
    expected = run(op, "reference", torch.float64, alone, None)
    actual = run(op, "triton", torch.float32, (q, k, v, cotangent), ids)
    shared = op is shared_toeplitz  # its lags' gradients are summed over the sequences
    for a, e in zip((actual[0], actual[3]) if shared else actual, (expected[0], expected[3]) if shared else expected):
        assert relative_error(a[:, own], e) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("op", [cauchy, vandermonde, low_rank])
@pytest.mark.parametrize("qk_dim", [1, 16, 17])
def test_any_number_of_dimensions(op, qk_dim):
    torch.manual_seed(0)
    check(op, torch.float32, inputs_of(20, torch.float32, qk_dim), None)


@pytest.mark.skipif(not ON_GPU, reason="slow where every program runs in Python")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("packed", [False, True])
def test_long_rows(op, packed):
    torch.manual_seed(0)
    ids = packed_ids(2047) if packed else None
    check(op, torch.bfloat16, inputs_of(2047, torch.bfloat16, qk_dim=16), ids)


def test_gradient_of_the_shift():
    torch.manual_seed(0)
    q, k, v, cotangent = inputs_of(37, torch.float32)
    found = {}
    for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        shift = torch.tensor(0.7, dtype=dtype, device=DEVICE, requires_grad=True)
        with force_backend(backend):
            y = cauchy_mix(q.to(dtype), k.to(dtype), v.to(dtype), shift, None)
        (found[backend],) = torch.autograd.grad(y, shift, cotangent.to(dtype))
    assert relative_error(found["triton"], found["reference"]) < 1e-4


def test_extreme_factors_of_a_cauchy_matrix_stay_finite():
    torch.manual_seed(0)
    q, k, v, cotangent = inputs_of(20, torch.float32)
    actual = run(cauchy, "triton", torch.float32, (60 * q, 60 * k, v, cotangent), None)
    expected = run(cauchy, "reference", torch.float64, (60 * q, 60 * k, v, cotangent), None)
    assert all(t.isfinite().all() for t in actual)
    assert relative_error(actual[0], expected[0]) < 1e-4


def test_large_angles_keep_their_digits():
    torch.manual_seed(0)
    q, k, v, cotangent = inputs_of(40, torch.float32)
    inputs = (1000 * q, 1000 * k, v, cotangent)
    expected = run(vandermonde, "reference", torch.float64, inputs, None)[0]
    # Angles of a thousand turns, of which float32 keeps a ten-thousandth of one.
    assert relative_error(run(vandermonde, "triton", torch.float32, inputs, None)[0], expected) < 2e-3


@pytest.mark.parametrize("op", OPS)
def test_compiles_without_graph_breaks(op):
    torch.manual_seed(0)
    q, k, v, _ = (t.float() for t in inputs_of(16, torch.float32))
    with force_backend("triton"):
        expected = op(q, k, v, None, residual=True)
        actual = torch.compile(lambda *t: op(*t, None, residual=True), backend="aot_eager", fullgraph=True)(q, k, v)
    torch.testing.assert_close(actual, expected)


@pytest.mark.usefixtures("most_of_the_gpu")
@pytest.mark.parametrize("op", OPS)
def test_more_than_2_to_31_elements(op):
    torch.manual_seed(0)
    length, nheads, headdim = 128, 12, 128
    batch = 2**31 // (length * nheads * headdim) + 3
    v = torch.randn(batch, length, nheads, headdim, device=DEVICE, dtype=torch.bfloat16)
    q, k = (torch.randn(batch, length, nheads, 4, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    results = []
    for part in (slice(None), slice(batch - 1, None)):
        # The first sample's lags are those that all share.
        leaves = [t[part].clone() for t in (q, k, v)]
        for t, whole in zip(leaves[:2], (q, k)):
            t[0] = whole[-1]
        leaves = [t.requires_grad_() for t in leaves]
        with force_backend("triton"):
            y = op(*leaves, None)
        y[-1:].float().square().sum().backward()
        # Of all samples together, since one op shares the first one's lags; the others' are zero but for the last.
        results.append([y[-1], leaves[2].grad[-1], *(t.grad.sum(0) for t in leaves[:2])])
    for all_of_them, alone in zip(*results):
        torch.testing.assert_close(all_of_them, alone)


@pytest.mark.parametrize(
    "options",
    [
        {"name": "cauchy"},
        {"name": "vandermonde"},
        {"name": "low_rank"},
        {"name": "toeplitz"},
        {"name": "toeplitz", "is_data_dependent": False},
        {"name": "toeplitz", "parity": "reference"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.parametrize("rows", ["whole", "padded", "packed"])
def test_blocks_are_the_same_with_either_backend(options, rows):
    torch.manual_seed(0)
    length = 24
    spec = {"qk_dim": 4, "headdim": 16, "max_seq_len": length} | options
    block = build_mixer(spec, 16).to(DEVICE)
    ids = packed_ids(length)
    real = torch.ones(2, length, dtype=torch.bool, device=DEVICE)
    packing = None
    if rows == "padded":
        real[0, 20:] = real[1, :3] = False
        packing = make_packing(real, None)
    elif rows == "packed":
        real, packing = ids >= 0, make_packing(None, ids)
    hidden = torch.randn(2, length, 16, device=DEVICE)
    cotangent = torch.randn(2, length, 16, device=DEVICE) * real[..., None]
    found = {}
    for backend in ("torch", "triton"):
        block.zero_grad()
        leaf = hidden.clone().requires_grad_()
        with force_backend(backend):
            y = block(leaf, packing) * real[..., None]
            (y * cotangent).sum().backward()
        found[backend] = [y, leaf.grad, *(p.grad for p in block.parameters() if p.grad is not None)]
    assert len(found["torch"]) == len(found["triton"])
    for a, e in zip(found["triton"], found["torch"]):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
