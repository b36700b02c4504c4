"""Structure, initial size, published interface and mistakes of the matrix mixers."""

import math

import pytest
import torch

from anymixer import MatrixMixer
from anymixer.errors import UserError
from anymixer.layers.packing import make_packing
from anymixer.mixers import build_mixer

LENGTH = 24
FIXED = {"is_data_dependent": False, "max_seq_len": LENGTH}
RECIPES = {  # options of the paper's ablation
    "dense": {"name": "dense", "headdim": 128, "max_seq_len": 128},
    "toeplitz_di": {"name": "toeplitz", "headdim": 64, "is_data_dependent": False, "max_seq_len": 128},
    "toeplitz_dd": {"name": "toeplitz", "headdim": 64},
    "vandermonde_dft": {"name": "vandermonde", "headdim": 64, "is_data_dependent": False, "is_dft": True},
}
for _name in ("vandermonde", "cauchy", "low_rank", "matrix_attention", "quasiseparable"):
    RECIPES[f"{_name}_dd"] = {"name": _name, "qk_dim": 16, "headdim": 128}
    RECIPES[f"{_name}_di"] = {
        "name": _name,
        "qk_dim": 64,
        "headdim": 64,
        "is_data_dependent": False,
        "max_seq_len": 128,
    }


def matrix_of(spec, length=LENGTH, d_model=32, batch=2):
    torch.manual_seed(0)
    mixer = build_mixer({"headdim": 16} | spec, d_model).double()
    with torch.no_grad():
        return mixer, mixer.matrix(torch.randn(batch, length, d_model, dtype=torch.float64))


@pytest.mark.parametrize("options", [{}, FIXED])
def test_toeplitz_entries_depend_on_the_distance_alone(options):
    _, matrix = matrix_of({"name": "toeplitz"} | options)
    torch.testing.assert_close(matrix[..., 1:, 1:], matrix[..., :-1, :-1])
    assert matrix.std() > 0.01


@pytest.mark.parametrize("options", [{}, FIXED])
def test_low_rank_is_of_low_rank(options):
    _, matrix = matrix_of({"name": "low_rank", "qk_dim": 3} | options)
    values = torch.linalg.svdvals(matrix)
    assert (values[..., 3:] < 1e-12 * values[..., :1]).all() and (values[..., 2] > 1e-3 * values[..., 0]).all()


@pytest.mark.parametrize("options", [{}, FIXED])
def test_off_diagonal_blocks_of_quasiseparable_have_the_rank_of_the_state(options):
    mixer, matrix = matrix_of({"name": "quasiseparable", "qk_dim": 1} | options)
    d_state = mixer.nheads * mixer.config.qk_dim
    for cut in range(1, LENGTH):
        for block in (matrix[..., cut:, :cut], matrix[..., :cut, cut:]):
            values = torch.linalg.svdvals(block)
            assert (values[..., d_state:] < 1e-10 * values[..., :1].clamp(min=1e-12)).all()
    assert torch.linalg.matrix_rank(matrix).min() > d_state  # the free diagonal


def test_rows_of_attention_are_weights():
    for options in ({}, FIXED):
        _, matrix = matrix_of({"name": "matrix_attention", "qk_dim": 4} | options)
        torch.testing.assert_close(matrix.sum(-1), torch.ones_like(matrix.sum(-1)))
        assert (matrix > 0).all()


@pytest.mark.parametrize("length", [1, 7, 24])
def test_dft_is_the_real_part_of_the_fourier_transform(length):
    mixer, matrix = matrix_of({"name": "vandermonde", "is_data_dependent": False, "is_dft": True}, length)
    signal = torch.randn(length, 5, dtype=torch.float64)
    expected = torch.fft.fft(signal, dim=0, norm="ortho").real
    torch.testing.assert_close(matrix[0, 0] @ signal, expected)
    assert not list(mixer.matrix_mixer.parameters())


def test_dft_of_a_padded_row_is_that_of_its_own_length():
    mixer, _ = matrix_of({"name": "vandermonde", "is_data_dependent": False, "is_dft": True})
    packing = make_packing(torch.tensor([[0, 1, 1, 1, 1, 1, 0]]), None)
    matrix = mixer.matrix(torch.randn(1, 7, 32, dtype=torch.float64), packing)
    signal = torch.randn(5, 2, dtype=torch.float64)
    torch.testing.assert_close(matrix[0, 0, 1:6, 1:6] @ signal, torch.fft.fft(signal, dim=0, norm="ortho").real)


def test_data_independent_vandermonde_by_its_formula():
    mixer, matrix = matrix_of({"name": "vandermonde", "qk_dim": 2} | FIXED)
    q, k = (p.detach().tolist() for p in (mixer.matrix_mixer.q_bias, mixer.matrix_mixer.k_bias))
    for t, s in ((0, 0), (3, 5), (23, 11)):
        total = sum(math.cos(2 * math.pi * q[1][d][t] * s) + math.cos(2 * math.pi * k[1][d][s] * t) for d in range(2))
        assert float(matrix[0, 1, t, s]) == pytest.approx(total / math.sqrt(2 * LENGTH * 2), rel=1e-6, abs=1e-9)


def test_data_independent_cauchy_by_its_formula():
    mixer, matrix = matrix_of({"name": "cauchy", "qk_dim": 2} | FIXED)
    q, k = (p.detach().tolist() for p in (mixer.matrix_mixer.q_matrix, mixer.matrix_mixer.k_matrix))
    total = sum(1 / (math.exp(q[3][1][d]) + math.exp(k[5][1][d]) + 1e-8) for d in range(2))
    assert float(matrix[0, 1, 3, 5]) == pytest.approx(total / math.sqrt(LENGTH * 2), rel=1e-6)


def test_cauchy_has_no_poles_however_negative_its_bias():
    mixer, _ = matrix_of({"name": "cauchy", "qk_dim": 2})
    with torch.no_grad():
        mixer.matrix_mixer.bias.fill_(-3.0)
    hidden = torch.randn(2, LENGTH, 32, dtype=torch.float64)
    assert (mixer.matrix(hidden) > 0).all()
    mixer(hidden).square().sum().backward()
    assert mixer.matrix_mixer.bias.grad.abs() > 0  # so it can come back


def test_parity_of_toeplitz_is_one_lag_off_and_wraps():
    exact, _ = matrix_of({"name": "toeplitz"} | FIXED)
    parity, _ = matrix_of({"name": "toeplitz", "parity": "reference"} | FIXED)
    parity.load_state_dict(exact.state_dict())
    hidden = torch.randn(1, LENGTH, 32, dtype=torch.float64)
    one, other = exact.matrix(hidden)[0], parity.matrix(hidden)[0]
    torch.testing.assert_close(other[:, :-1], one[:, 1:].roll(0, -1))  # row t reads what row t + 1 should
    w = exact.matrix_mixer.w
    assert torch.equal(other[:, -1, 0], 0.5 / math.sqrt(LENGTH) * w[:, 0])


def test_parity_of_data_dependent_toeplitz_reads_the_published_places():
    mixer, _ = matrix_of({"name": "toeplitz", "parity": "reference", "max_seq_len": LENGTH})
    hidden = torch.randn(1, LENGTH, 32, dtype=torch.float64)
    _, _, factors = mixer._project(hidden, None)
    f, r = factors[0, :, : mixer.nheads], factors[0, :, mixer.nheads :]
    matrix = mixer.matrix(hidden)[0] * 2 * math.sqrt(LENGTH)
    torch.testing.assert_close(matrix[:, 4, 4], f[1])
    torch.testing.assert_close(matrix[:, 4, 5], f[0])
    torch.testing.assert_close(matrix[:, 4, 6], r[1])
    torch.testing.assert_close(matrix[:, LENGTH - 1, 0], r[LENGTH - 1])


def test_parity_of_data_independent_vandermonde_is_the_fourier_transform():
    block = MatrixMixer("vandermonde", False, 32, qk_dim=4, max_seq_len=LENGTH, headdim=16, parity="reference")
    assert list(dict(block.matrix_mixer.named_buffers())) == ["dft_matrix"]
    matrix = block.matrix(torch.randn(1, LENGTH, 32))
    signal = torch.randn(LENGTH, 2)
    torch.testing.assert_close(
        matrix[0, 0] @ signal, torch.fft.fft(signal, dim=0, norm="ortho").real, rtol=1e-4, atol=1e-4
    )


def test_parity_scales_by_max_seq_len():
    hidden = torch.randn(1, 6, 32, dtype=torch.float64)
    exact, _ = matrix_of({"name": "low_rank", "qk_dim": 4, "max_seq_len": LENGTH})
    parity, _ = matrix_of({"name": "low_rank", "qk_dim": 4, "max_seq_len": LENGTH, "parity": "reference"})
    parity.load_state_dict(exact.state_dict())
    torch.testing.assert_close(parity.matrix(hidden) * math.sqrt(LENGTH / 6), exact.matrix(hidden))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(("d_model", "std"), [(768, 0.02), (768, None), (192, 0.02)])
def test_initial_mixing_is_between_a_tenth_and_the_whole(name, d_model, std):
    torch.manual_seed(0)
    mixer = build_mixer(RECIPES[name], d_model)
    if std is not None:  # as a model initialises it
        for module in mixer.modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=std)
        mixer.reset_own_parameters()
    with torch.no_grad():
        matrix = mixer.matrix(torch.randn(1, 128, d_model))
    values = torch.randn(1, mixer.nheads, 128, 64)
    assert 0.1 < (matrix @ values).norm() / values.norm() < 1.0


@pytest.mark.parametrize("kind", ["toeplitz", "vandermonde", "cauchy", "low_rank", "attention", "quasiseparable"])
def test_the_published_example_runs_without_max_seq_len(kind):
    batch, length, dim = 2, 64, 16
    model = MatrixMixer(matrix_mixer_type=kind, is_data_dependent=True, d_model=dim, qk_dim=16)
    x = torch.randn(batch, length, dim)
    assert model(x).shape == x.shape


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "dense", "is_data_dependent": True}, r"mixer.is_data_dependent: a dense matrix is data-independent"),
        ({"name": "dense"}, r"mixer.max_seq_len: missing"),
        ({"name": "cauchy", "is_data_dependent": False}, r"mixer.max_seq_len: missing"),
        ({"name": "cauchy", "headdim": 48}, r"mixer.headdim: 48 does not divide expand \* d_model = 64"),
        ({"name": "cauchy", "d_conv": 4}, r"mixer.d_conv: 4 is even"),
        ({"name": "low_rank", "qk_dim": 0}, r"mixer.qk_dim: 0 is not positive"),
        ({"name": "vandermonde", "is_dft": True}, r"mixer.is_dft: the Fourier transform is data-independent"),
        ({"name": "quasiseparable", "chunk_size": 0}, r"mixer.chunk_size: 0 is not positive"),
        ({"name": "toeplitz", "parity": "exakt"}, r"mixer.parity: 'exakt' is none of exact, reference"),
        ({"name": "toplitz"}, r"mixer.name: unknown mixer 'toplitz'; did you mean 'toeplitz'\? \(known: attention, "),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(spec, message):
    with pytest.raises(UserError, match=message) as error:
        build_mixer(spec, 32)
    assert "\n" not in str(error.value)


def test_an_unknown_matrix_type_is_named():
    with pytest.raises(UserError, match=r"matrix_mixer_type: unknown matrix 'cauchi'; did you mean 'cauchy'"):
        MatrixMixer("cauchi", True, 32, 4)
