"""The ops that run by mamba-ssm's scan against their definitions, with a stand-in for it; on a GPU with it."""

import sys
from importlib import metadata

import pytest
import torch
from anymixer_kernels import current_backend, force_backend, mamba_ssm_scan
from anymixer_kernels.backend import mamba_ssm_problem, takes_triton
from anymixer_kernels.linear_recurrence import StateSpace, linear_recurrence, linear_recurrence_both_ways
from anymixer_kernels.linear_recurrence.mamba_ssm_form import linear_recurrence_mamba_ssm
from anymixer_kernels.quasiseparable import QuasiseparableInputs, quasiseparable
from anymixer_kernels.quasiseparable.mamba_ssm_form import quasiseparable_mamba_ssm
from mamba_ssm_stand_in import mamba_ssm  # noqa: F401
from torch.nn.functional import softplus
from triton_cases import packed_ids, relative_error

NHEADS, HEADDIM, D_STATE = 4, 3, 5
RUNS_HERE = mamba_ssm_problem("cuda" if torch.cuda.is_available() else "cpu") is None


def make(length, ngroups=2, dtype=torch.float64, headdim=HEADDIM, d_state=D_STATE, seed=0):
    """x, diagonal, A, and dt, B, C twice."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    parts = [normal(2, length, NHEADS, headdim), normal(2, length, NHEADS), -torch.exp(normal(NHEADS))]
    for _ in range(2):
        parts += [softplus(normal(2, length, NHEADS) - 1)]
        parts += [normal(2, length, ngroups, d_state) for _ in "BC"]
    return [t.requires_grad_() for t in parts]


def hydra_inputs(parts, **options):
    x, diagonal, A, dt_f, B_f, C_f, dt_b, B_b, C_b = parts
    return QuasiseparableInputs(x, (dt_f, dt_b), A, (B_f, B_b), (C_f, C_b), diagonal, **options)


def rows_of(ids, length):
    return torch.ones(2, length, 1, 1, dtype=torch.bool) if ids is None else (ids >= 0)[..., None, None]


@pytest.mark.parametrize("length", [1, 2, 17, 40])
@pytest.mark.parametrize("ngroups", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shift", [True, False])
def test_quasiseparable_equals_the_definition_with_all_gradients(length, ngroups, packed, shift, mamba_ssm):  # noqa: F811
    parts = make(length, ngroups)
    state = torch.randn(NHEADS, HEADDIM, D_STATE, dtype=torch.float64, requires_grad=True)
    ids = packed_ids(length) if packed else None
    real = rows_of(ids, length)
    inputs = hydra_inputs(parts, sequence_id=ids, initial_state=state, shift=shift)
    cotangent = torch.randn(2, length, NHEADS, HEADDIM, dtype=torch.float64) * real
    results = []
    for form in (quasiseparable, lambda inputs: quasiseparable_mamba_ssm(inputs, chunk_size=16)):
        with force_backend("reference"):
            y = form(inputs) * real
        results.append((y, *torch.autograd.grad((y * cotangent).sum(), [*parts, state], allow_unused=True)))
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("length", [1, 17, 40])
@pytest.mark.parametrize("how", ["plain", "initial state", "packed"])
def test_mamba_2_s_recurrence_equals_the_definition_with_all_gradients(length, how, mamba_ssm):  # noqa: F811
    x, _, A, dt, k, q, *_ = parts = make(length)
    initial = torch.randn(2, NHEADS, D_STATE, HEADDIM, dtype=torch.float64) if how == "initial state" else None
    ids = packed_ids(length) if how == "packed" else None
    real = rows_of(ids, length)
    used = [parts[i] for i in (0, 2, 3, 4, 5)]
    results = []
    for by_mamba_ssm in (False, True):
        if by_mamba_ssm:
            y, state = linear_recurrence_mamba_ssm(q, k, StateSpace(x, dt, A), initial, ids)
        else:
            with force_backend("reference"):
                v = x * dt[..., None]
                y, state = linear_recurrence(q, k, v, A * dt, initial_state=initial, sequence_id=ids)
        grads = torch.autograd.grad((y * real).square().sum() + state.square().sum(), used)
        results.append((y * real, state, *grads))
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_it_runs_where_it_is_asked_for_and_nowhere_else(mamba_ssm):  # noqa: F811
    inputs = hydra_inputs([t.detach().float() for t in make(40)])
    expected = quasiseparable(inputs)
    assert not mamba_ssm
    with force_backend("mamba_ssm"):
        assert current_backend() == "mamba_ssm"
        torch.testing.assert_close(quasiseparable(inputs, chunk_size=33), expected, rtol=1e-4, atol=1e-5)
        assert not takes_triton(inputs.x, "another op")
    assert mamba_ssm == [64]


def test_garbage_in_padding_changes_nothing(mamba_ssm):  # noqa: F811
    ids = packed_ids(40)
    parts = [t.detach().float() for t in make(40)]
    inputs = hydra_inputs(parts, sequence_id=ids)
    with force_backend("mamba_ssm"):
        clean = quasiseparable(inputs)[ids >= 0]
        parts[0][ids < 0] = float("nan")
        torch.testing.assert_close(quasiseparable(inputs)[ids >= 0], clean, rtol=0, atol=0)


def test_what_it_has_no_form_for_is_refused(mamba_ssm):  # noqa: F811
    x, _, A, dt, k, q, *_ = make(4)
    with force_backend("mamba_ssm"):
        with pytest.raises(RuntimeError, match=r"quasiseparable mixing: the mamba_ssm backend.*no form for float64"):
            quasiseparable(hydra_inputs(make(4)))
        with pytest.raises(RuntimeError, match=r"linear recurrence: .* no form for decays other than step sizes"):
            linear_recurrence(q, k, x, A * dt)
        with pytest.raises(RuntimeError, match=r"linear recurrence: .* no form for decays other than step sizes"):
            linear_recurrence_both_ways(q, k, x, A * dt)


@pytest.fixture
def forgotten(monkeypatch):
    """As if mamba-ssm had not been looked for yet; whatever is imported as such is forgotten again."""

    def ours():
        return [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]

    def forget():
        for cached in (mamba_ssm_scan.scan_function, mamba_ssm_scan.import_problem):
            cached.cache_clear()

    for name in ours():
        monkeypatch.delitem(sys.modules, name)
    forget()
    yield forget
    for name in ours():
        del sys.modules[name]
    forget()


def test_a_machine_without_it_says_why(monkeypatch, forgotten):
    inputs = hydra_inputs([t.detach().float() for t in make(4)])
    with force_backend("mamba_ssm"), pytest.raises(RuntimeError, match=r"quasisep.* mixing: .*does not run on 'cpu'"):
        quasiseparable(inputs)

    def problem(**found):
        def version(name):
            if name not in found:
                raise metadata.PackageNotFoundError(name)
            return found[name]

        monkeypatch.setattr(mamba_ssm_scan.metadata, "version", version)
        forgotten()
        return mamba_ssm_scan.import_problem()

    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    assert "mamba-ssm is not installed" in problem(triton="3.6.0")
    too_old = problem(triton="3.3.0", **{"mamba-ssm": "2.3.2.post1"})
    assert "needs Triton 3.5 or newer and finds 3.3.0; take mamba-ssm 2.3.1" in too_old
    for triton, ours in (("3.3.0", "2.3.1"), ("3.6.0", "2.3.2.post1")):
        found = problem(triton=triton, **{"mamba-ssm": ours})
        assert f"mamba-ssm {ours} cannot be imported (ModuleNotFoundError: import of mamba_ssm halted" in found


def test_a_build_without_the_cuda_extension_is_imported(tmp_path, monkeypatch, forgotten):
    folder = tmp_path / "mamba_ssm" / "ops" / "triton"
    folder.mkdir(parents=True)
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("import selective_scan_cuda\n")
    for package in (folder, folder.parent):
        (package / "__init__.py").touch()
    (folder / "ssd_combined.py").write_text("def mamba_chunk_scan_combined():\n    return 'scanned'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", None)
    assert mamba_ssm_scan.scan_function()() == "scanned"


@pytest.mark.skipif(not RUNS_HERE, reason="mamba-ssm does not run here")
@pytest.mark.parametrize("length", [1, 63, 128, 500, 2049])
@pytest.mark.parametrize("packed", [False, True])
def test_on_a_gpu_it_equals_the_float64_reference(length, packed):
    parts = make(length, headdim=64, d_state=64)
    ids = packed_ids(length) if packed else None
    real = rows_of(ids, length)
    cotangent = torch.randn(2, length, NHEADS, 64, dtype=torch.float64) * real
    with force_backend("reference"):
        expected = quasiseparable(hydra_inputs(parts, sequence_id=ids)) * real
    expected_grads = torch.autograd.grad((expected * cotangent).sum(), parts, allow_unused=True)
    for dtype, tolerance in ((torch.float32, 3e-3), (torch.bfloat16, 2e-2)):
        low = [
            t.detach().to("cuda", torch.float32 if t.dim() < 4 else dtype).requires_grad_() for t in parts
        ]  # fmt: skip
        with force_backend("mamba_ssm"):
            actual = quasiseparable(hydra_inputs(low, sequence_id=None if ids is None else ids.cuda())) * real.cuda()
        grads = torch.autograd.grad((actual * cotangent.cuda()).sum(), low, allow_unused=True)
        for a, e in [(actual, expected), *zip(grads, expected_grads)]:
            assert relative_error(a, e) < tolerance
