"""DSS, GSS, EMA, long convolutions and LSSL: their kernels against the formulas, and against each other."""

import pytest
import torch

import anymixer
from anymixer.errors import UserError
from anymixer.layers.hippo import diagonal_plus_low_rank
from anymixer.layers.packing import make_packing
from anymixer.mixers import build_mixer
from anymixer.mixers.dss import DSS
from anymixer.mixers.ema import EMA
from anymixer.mixers.gss import GSS
from anymixer.mixers.longconv import LongConv
from anymixer.mixers.lssl import LSSL
from anymixer.mixers.s4 import S4


@torch.no_grad()
def test_dss_is_a_softmax_over_places():
    torch.manual_seed(0)
    mixer = DSS(2, d_state=8, l_max=50, causal=True).double()
    A = torch.complex(-mixer.log_A_real.exp(), mixer.A_imag)
    B, C = torch.view_as_complex(mixer.B), torch.view_as_complex(mixer.C[0])
    powers = torch.exp(mixer.log_dt.exp()[:, None, None] * A[..., None] * torch.arange(50))
    softmax = powers / powers.sum(-1, keepdim=True)
    expected = 2 * torch.einsum("hn,hnl->hl", B * C / A, softmax).real
    torch.testing.assert_close(mixer.lags(50)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", ["cauchy", "powers"])
@pytest.mark.parametrize("init", ["legs", "legt"])
@torch.no_grad()
def test_s4_is_lssl_with_the_same_matrix(kernel, init):
    torch.manual_seed(0)
    s4, lssl = (cls(3, d_state=8, init=init, causal=True).double() for cls in (S4, LSSL))
    form = diagonal_plus_low_rank(init, 8)
    s4.config.kernel = kernel
    # S4 rounds its parameters to float32 and cuts B; here neither.
    s4.log_A_real.copy_(torch.log((-form.eigenvalues.real).clamp(min=1e-12)).expand_as(s4.log_A_real))
    s4.A_imag.copy_(form.eigenvalues.imag.expand_as(s4.A_imag))
    s4.B.copy_(torch.view_as_real(form.B.resolve_conj()).expand_as(s4.B))
    s4.P.copy_(torch.view_as_real(form.P.resolve_conj()).expand_as(s4.P))
    s4.C.copy_(torch.view_as_real(lssl.C.to(form.V.dtype) @ form.V))
    s4.log_dt.copy_(lssl.log_dt)
    torch.testing.assert_close(s4.lags(60)[0], lssl.lags(60)[0], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_ema_is_the_recurrence_of_mega():
    torch.manual_seed(0)
    mixer = EMA(3, d_state=4, causal=True).double()
    gain = torch.sigmoid(mixer.delta[0])
    keep = 1 - gain * torch.sigmoid(mixer.alpha[0])
    u = torch.randn(1, 20, 3, dtype=torch.float64)
    state, expected = torch.zeros(3, 4, dtype=torch.float64), []
    for token in u[0]:
        state = gain * mixer.beta[0] * token[:, None] + keep * state
        expected.append((state * mixer.gamma[0]).sum(-1) / 2)
    mixed = (mixer.matrix(u) @ mixer.values(u))[0, ..., 0].T
    torch.testing.assert_close(mixed, torch.stack(expected))


@torch.no_grad()
def test_a_long_convolution_sees_l_max_tokens_and_rows_may_be_longer():
    mixer = LongConv(2, l_max=3)
    matrix = mixer.matrix(torch.zeros(1, 8, 2))[0, 0]
    index = torch.arange(8)
    lag = index[:, None] - index
    assert ((matrix != 0) == ((lag < 3) & (lag >= -3))).all()
    assert matrix[5, 4] == mixer.kernel[0, 0, 1] and matrix[4, 5] == mixer.kernel[1, 0, 0]


def test_gss_keeps_steps_and_inputs_as_they_are():
    mixer = GSS(8, d_state=4)
    assert {name for name, _ in mixer.named_parameters(recurse=False)} == {"D", "C", "log_A_real", "A_imag"}
    assert mixer.log_dt.eq(0).all() and mixer.channels == 2 and mixer.gate_proj.out_features == 32
    assert set(mixer.param_hints()) == {"log_A_real", "A_imag"}
    assert {"log_dt", "B"} <= set(mixer.state_dict())


@pytest.mark.parametrize("name", ["s4d", "s4", "dss", "gss", "ema", "longconv", "lssl"])
@torch.no_grad()
def test_long_rows_equal_short_ones_in_every_form(name):
    """Rows of 300 take Fourier transforms, or scans of chunks where a state is asked for; packed, Toeplitz products."""
    torch.manual_seed(0)
    mixer = build_mixer({"name": name, "causal": True}, 8)
    hidden = torch.randn(1, 300, 8)
    whole = mixer(hidden)
    ids = torch.zeros(1, 300, dtype=torch.long)
    torch.testing.assert_close(mixer(hidden, make_packing(None, ids)), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixer.prefill(hidden)[0], whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixer(hidden[:, :100]), whole[:, :100], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["s4d", "s4", "dss", "gss", "lssl"])
def test_steps_and_matrices_keep_float32_under_bfloat16_weights(name):
    torch.manual_seed(0)
    mixer = build_mixer({"name": name, "d_state": 16, "causal": True}, 32)
    mixer(torch.randn(1, 8, 32)).sum().backward()
    with torch.no_grad():
        exact = mixer.lags(512)[0]
        weights = {key: tensor.clone() for key, tensor in mixer.state_dict().items()}
        mixer.to(torch.bfloat16)
        assert mixer.C.dtype == mixer.out_proj.weight.dtype == torch.bfloat16
        assert {p.grad.dtype for p in mixer.parameters() if p.dtype == torch.float32} <= {torch.float32}
        assert (mixer.lags(512)[0] - exact).norm() < 5e-3 * exact.norm()
        assert mixer(torch.randn(1, 300, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
        mixer.float()
    for key in mixer.dynamics:
        if key in weights:
            assert torch.equal(mixer.state_dict()[key], weights[key])
    assert {tensor.dtype for tensor in mixer.double().state_dict().values()} == {torch.float64}


@pytest.mark.parametrize("name", ["s4d", "longconv", "ema"])
def test_a_mixer_of_both_directions_says_that_it_cannot_step(name):
    mixer = build_mixer(name, 8)
    for call in (
        lambda: mixer.init_state(1),
        lambda: mixer.step(torch.zeros(1, 8), {}),
        lambda: mixer.state_size(1),
        lambda: mixer.prefill(torch.zeros(1, 2, 8)),
    ):
        with pytest.raises(NotImplementedError, match="is not causal"):
            call()


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"name": "dss", "l_max": 0}, "mixer.l_max: 0"),
        ({"name": "dss", "disc": "zoh"}, "mixer.disc: 'zoh'"),
        ({"name": "longconv", "l_max": 0}, "mixer.l_max: 0"),
        ({"name": "ema", "d_state": 0}, "mixer.d_state: 0"),
        ({"name": "gss", "bottleneck": 3}, "mixer.bottleneck: 3"),
        ({"name": "lssl", "init": "lin"}, "mixer.init: 'lin'"),
    ],
)
def test_mistakes_are_named(spec, message):
    with pytest.raises(UserError, match=message):
        build_mixer(spec, 8)


@pytest.mark.parametrize("mode", ["dplr", "diag", "dss", "conv", "ema", "lssl"])
def test_s4_block_is_its_mixer_and_dropout(mode):
    torch.manual_seed(0)
    block = anymixer.S4Block(8, mode=mode, dropout=0.5)
    x = torch.randn(2, 6, 8)
    y = block.eval()(x)
    assert torch.equal(y, block.mixer(x))
    state = block.mixer.init_state(2)
    torch.testing.assert_close(block.step(x[:, 0], state)[0], y[:, 0], rtol=1e-4, atol=1e-5)
    ratio = block.train()(x) / y
    assert ((ratio.abs() < 1e-6) | ((ratio - 2).abs() < 1e-5)).all()
    assert (ratio.std(dim=1) < 1e-5).all()
    block.tie_dropout = False
    assert ((block(x) / y).std(dim=1) > 0.1).any()


def test_plain_modules_come_from_the_package():
    x = torch.randn(1, 5, 8)
    modules = [anymixer.S4D(d_model=8), anymixer.S4Block(d_model=8, bidirectional=True)]
    modules += [anymixer.HGRN2(d_model=8, expand_ratio=4), anymixer.HGRN2(8, causal=True, expand_ratio=4)]
    for module in modules:
        assert module(x).shape == x.shape
    with pytest.raises(UserError, match=r"diag\.d_stat: unknown key"):
        anymixer.S4Block(8, mode="diag", d_stat=3)
