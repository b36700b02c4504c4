"""S4D: initial frequencies, kernels against sums in complex numbers, parameter counts and groups."""

import pytest
import torch

from anymixer.errors import UserError
from anymixer.layers.packing import make_packing
from anymixer.layers.param_hints import ParamHint
from anymixer.mixers import build_mixer
from anymixer.mixers.s4d import S4D

KNOWN = {
    "lin": [0.0, 3.14159265, 6.28318531],
    "inv": [1283.4255, 414.2273, 240.3876, 165.8849, 124.4945],
    "legs": [0.263857],
}


@pytest.mark.parametrize("init", KNOWN)
def test_initial_frequencies(init):
    mixer = S4D(4, d_state=64, init=init)
    known = torch.tensor(KNOWN[init])
    torch.testing.assert_close(mixer.A_imag[0, : len(known)].data, known, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(torch.exp(mixer.log_A_real.data), torch.full((4, 32), 0.5))


def kernel_in_complex_numbers(mixer, length):
    """2 Re sum_n C B (exp(dt A) - 1) / A exp(l dt A), or the bilinear rule's, in float64 and without tables."""
    A = torch.complex(-mixer.log_A_real.double().exp(), mixer.A_imag.double()).repeat(mixer.channels // len(mixer.B), 1)
    B, C = torch.view_as_complex(mixer.B.double()), torch.view_as_complex(mixer.C.double())
    dt = mixer.log_dt.double().exp()[:, None]
    if mixer.config.disc == "zoh":
        step, drive = torch.exp(dt * A), (torch.exp(dt * A) - 1) / A
    else:
        step, drive = (1 + dt * A / 2) / (1 - dt * A / 2), dt / (1 - dt * A / 2)
    powers = torch.exp(torch.log(step)[..., None] * torch.arange(length))
    return 2 * torch.einsum("chn,hnl->chl", C * B.repeat(mixer.channels // len(B), 1) * drive, powers).real


@pytest.mark.parametrize("options", [{}, {"init": "inv", "n_ssm": 2}, {"disc": "bilinear"}, {"init": "legs"}])
@pytest.mark.parametrize("length", [1, 100, 16384])
@torch.no_grad()
def test_kernels_in_float32_equal_sums_in_complex_float64(options, length):
    torch.manual_seed(0)
    mixer = S4D(4, d_state=64, **options)
    kernels = torch.stack(mixer.lags(length))
    expected = kernel_in_complex_numbers(mixer, length)
    assert (kernels.double() - expected).norm() / expected.norm() < 1e-5

    torch.manual_seed(0)
    mixer = S4D(2, d_state=4).double()
    matrix = mixer.matrix(torch.zeros(1, 6, 2, dtype=torch.float64))[0]
    below, above = mixer.lags(6)
    for t in range(6):
        for s in range(6):
            expected = below[:, t - s] if s <= t else above[:, s - t - 1]
            torch.testing.assert_close(matrix[:, t, s], expected)
    # every block above or below the diagonal has at most the state's rank
    assert (
        torch.linalg.matrix_rank(
            S4D(2, d_state=2).double().matrix(torch.zeros(1, 8, 2, dtype=torch.float64))[0, :, 4:, :4]
        ).max()
        <= 2
    )


@pytest.mark.parametrize(
    "options, expected",
    [({}, 20_736), ({"causal": False}, 20_736 + 4096), ({"n_ssm": 1, "causal": False}, 16_832 - 64)],
)
def test_parameter_counts_are_the_published_layers(options, expected):
    """One direction, both, and both with one A and B for all; the last less P, which S4 has besides."""
    mixer = S4D(64, d_state=64, **{"causal": True, **options})
    assert sum(p.numel() for p in mixer.parameters()) == expected


def test_twice_the_rate_reads_every_second_token():
    torch.manual_seed(0)
    fine = S4D(2, d_state=8, dt_min=1e-4, dt_max=1e-3, causal=True)
    coarse = S4D(2, d_state=8, dt_min=1e-4, dt_max=1e-3, causal=True, rate=2.0)
    coarse.load_state_dict(fine.state_dict())
    # the integral over a step is twice as large
    torch.testing.assert_close(coarse.lags(50)[0], 2 * fine.lags(100)[0][:, ::2], rtol=2e-2, atol=1e-5)


def test_steps_a_and_b_have_a_learning_rate_of_their_own_and_no_decay():
    own = ParamHint(weight_decay=False, lr=1e-3)
    assert S4D(4, d_state=4).param_hints() == dict.fromkeys(("log_dt", "log_A_real", "A_imag", "B"), own)
    assert S4D(4, d_state=4, init="real", ssm_lr=None).param_hints()["B"] == ParamHint(weight_decay=False)


def test_a_long_packed_row_equals_its_sequences_alone():
    torch.manual_seed(0)
    mixer = S4D(2, d_state=4)
    pieces = [torch.randn(1, n, 2) for n in (700, 5, 600)]
    ids = torch.tensor([[0] * 700 + [1] * 5 + [2] * 600])
    packed = mixer(torch.cat(pieces, dim=1), make_packing(None, ids))
    torch.testing.assert_close(packed, torch.cat([mixer(p) for p in pieces], dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"d_state": 3}, "mixer.d_state: 3 is not an even number"),
        ({"n_ssm": 3}, "mixer.n_ssm: 3 does not divide the 8 channels"),
        ({"bottleneck": 3}, "mixer.bottleneck: 3 does not divide"),
        ({"init": "real", "disc": "bilinear"}, "mixer.disc: bilinear"),
        ({"dt_min": 0.0}, "mixer.dt_min: 0.0"),
        ({"rate": 0.0}, "mixer.rate: 0.0"),
        ({"gate_expand": 0}, "mixer.gate_expand: 0"),
        ({"init": "hippo"}, "mixer.init: 'hippo'"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(UserError, match=message):
        build_mixer({"name": "s4d", **options}, 8)
