"""S4: known kernels, parameter counts, its initial values, and what it computes against HiPPO's own matrix."""

import pytest
import torch
from anymixer_kernels.lti import LowRankSystem

from anymixer.layers.hippo import LOW_RANK, diagonal_plus_low_rank, hippo
from anymixer.mixers.s4 import S4


def system_of(name, size, dt, cauchy, decay=0.0):
    """The diagonal plus low-rank form of a HiPPO matrix, less decay times 1, with C = 1 in its own coordinates."""
    form = diagonal_plus_low_rank(name, size)
    rows = lambda z: torch.cat([z.real, z.imag], dim=-1)[None]  # noqa: E731
    readout = form.V.sum(0)
    return LowRankSystem(
        dt * (form.eigenvalues.real[None] - decay),
        dt * form.eigenvalues.imag[None],
        dt**0.5 * rows(form.P),
        dt * rows(form.B),
        2 * rows(readout.conj()),
        cauchy,
    )


@pytest.mark.parametrize("cauchy", [True, False])
def test_the_known_kernel_of_legs(cauchy):
    kernel = system_of("legs", 4, 0.1, cauchy).kernel(5)[0]
    known = [0.5470522, 0.22343937, 0.06399393, -0.00459942, -0.02562155]
    torch.testing.assert_close(kernel, torch.tensor(known, dtype=torch.float64), rtol=0, atol=5e-8)


@pytest.mark.parametrize("name", LOW_RANK)
@pytest.mark.parametrize("cauchy", [True, False])
@pytest.mark.parametrize("length", [1, 2, 64, 101])
def test_kernels_are_those_of_the_hippo_matrix(name, cauchy, length):
    A, B = hippo(name, 16)
    one, dt = torch.eye(16, dtype=A.dtype), 0.02
    decay = 1e-3 if name == "fout" else 0.0  # an eigenvalue 0 is a pole of the Cauchy sums
    A = A - decay * one
    step = torch.linalg.solve(one - dt / 2 * A, one + dt / 2 * A)
    state, expected = torch.linalg.solve(one - dt / 2 * A, dt * B), []
    for _ in range(length):
        expected.append(state.sum())
        state = step @ state
    kernel = system_of(name, 16, dt, cauchy, decay).kernel(length)[0]
    torch.testing.assert_close(kernel, torch.stack(expected), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("init", ["legs", "fout"])
@pytest.mark.parametrize("kernel", ["cauchy", "powers"])
@torch.no_grad()
def test_float32_kernels_of_long_rows_are_close_to_float64(init, kernel):
    torch.manual_seed(0)
    mixer = S4(2, d_state=64, init=init, kernel=kernel, causal=True)
    low = mixer.lags(16384)[0]
    high = mixer.double().lags(16384)[0]
    assert (low - high).norm() / high.norm() < 1e-4


@pytest.mark.parametrize(
    "options, expected", [({"causal": True}, 24_832), ({"n_ssm": 1}, 16_832)], ids=["causal", "both ways, shared"]
)
def test_parameter_counts_are_the_published_layers(options, expected):
    assert sum(p.numel() for p in S4(64, d_state=64, **options).parameters()) == expected


@torch.no_grad()
def test_stepping_stays_close_for_many_tokens():
    torch.manual_seed(0)
    for step in ("linear", "dense"):
        mixer = S4(2, d_state=64, causal=True, step=step)
        hidden = torch.randn(1, 256, 2)
        whole, state = mixer(hidden), mixer.init_state(1)
        for place in range(256):
            output, state = mixer.step(hidden[:, place], state)
            torch.testing.assert_close(output, whole[:, place], rtol=1e-4, atol=1e-5)


def test_the_same_seed_gives_the_same_hippo_values_and_large_inputs_are_cut():
    first, second = S4(2, d_state=64), S4(2, d_state=64)
    assert torch.equal(first.B, second.B) and torch.equal(first.P, second.P)
    assert first.B.max() == 2.0 and first.B.min() == 0.0
    assert set(first.param_hints()) == {"log_dt", "log_A_real", "A_imag", "B", "P"}
