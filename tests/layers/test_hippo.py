"""HiPPO matrices: published spectra, and the diagonal plus low-rank form against the matrix itself."""

import pytest
import torch

from anymixer.layers.hippo import LOW_RANK, diagonal_plus_low_rank, hippo, low_rank


@pytest.mark.parametrize("name", LOW_RANK)
@pytest.mark.parametrize("size", [2, 4, 16])
def test_the_low_rank_term_makes_the_matrix_normal(name, size):
    A, P = hippo(name, size)[0], low_rank(name, size)
    normal = A + P.T @ P
    skew = normal - normal[0, 0] * torch.eye(size)
    torch.testing.assert_close(skew, -skew.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LOW_RANK)
@pytest.mark.parametrize("size", [4, 16, 64])
def test_the_form_gives_the_matrix_back(name, size):
    A, B = hippo(name, size)
    form = diagonal_plus_low_rank(name, size)
    V = torch.cat([form.V, form.V.conj()], dim=1)
    P = torch.cat([form.P, form.P.conj()], dim=1)
    eigenvalues = torch.cat([form.eigenvalues, form.eigenvalues.conj()])
    again = V @ (torch.diag(eigenvalues) - P.T @ P.conj()) @ V.conj().T
    torch.testing.assert_close(again, A.to(again.dtype), rtol=1e-9, atol=1e-9 * A.abs().max().item())
    torch.testing.assert_close(form.V.conj().T @ B.to(V.dtype), form.B, rtol=1e-9, atol=1e-9)
    assert (form.eigenvalues.imag >= 0).all() and (form.B.real >= 0).all() and form.B.imag.abs().max() < 1e-9


@pytest.mark.parametrize(
    "size, frequencies",
    [
        (4, [0.556501, 4.603293]),
        (8, [0.427489, 1.957794, 5.354209, 19.85741]),
        (64, [0.263857, 258.1522, 433.0308, 1303.2738]),
        (256, [20860.23]),
    ],
)
def test_legs_has_the_known_spectrum(size, frequencies):
    form = diagonal_plus_low_rank("legs", size)
    imag = form.eigenvalues.imag
    known = torch.tensor(frequencies, dtype=imag.dtype)
    found = imag if len(known) == len(imag) else torch.cat([imag[:1], imag[-3:]])[-len(known) :]
    torch.testing.assert_close(found, known, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(form.eigenvalues.real, torch.full_like(imag, -0.5))
    assert 2 * form.B.abs().square().sum().item() == pytest.approx(size**2, rel=1e-9)


def test_legs_written_out():
    A, B = hippo("legs", 3)
    root = torch.sqrt(torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64))
    expected = [[-1, 0, 0], [-root[1], -2, 0], [-root[2], -root[1] * root[2], -3]]
    torch.testing.assert_close(A, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(B, root)


def test_legs_states_are_the_coefficients_of_the_past_in_legendre_polynomials():
    """exp(t A) B is sqrt(2n+1) P_n(2 exp(-t) - 1) exp(-t)."""
    A, B = hippo("legs", 8)
    for t in (0.1, 0.7, 2.0):
        x = torch.tensor(2 * torch.e ** (-t) - 1, dtype=torch.float64)
        expected = torch.stack([torch.special.legendre_polynomial_p(x, n) for n in range(8)])
        expected = expected * torch.sqrt(2 * torch.arange(8.0, dtype=torch.float64) + 1) * torch.e ** (-t)
        torch.testing.assert_close(torch.linalg.matrix_exp(t * A) @ B, expected, rtol=1e-9, atol=1e-9)


def test_another_name_is_an_error():
    with pytest.raises(ValueError, match="no HiPPO matrix 'legz'"):
        hippo("legz", 4)
