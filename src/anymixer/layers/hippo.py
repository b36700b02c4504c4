"""HiPPO matrices: systems x' = A x + B u whose state is the coefficients of the past input in a basis (arXiv
2008.07669, 2206.12037), and the diagonal plus low-rank form of them that S4 computes with (arXiv 2111.00396)."""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

LOW_RANK = ("legs", "legt", "lagt", "fout")


def hippo(name: str, size: int) -> tuple[Tensor, Tensor]:
    """A [size, size] and B [size], float64 on the CPU.

    legs: scaled Legendre, an exponential window on all of the past (its time-invariant form). legt: Legendre on a
    sliding window. lagt: Laguerre. fout: Fourier on a sliding window; an even size. Raises ValueError for another name.
    """
    n = torch.arange(size, dtype=torch.float64, device="cpu")
    root = torch.sqrt(2 * n + 1)
    earlier = n[:, None] > n
    if name == "legs":
        return -torch.where(earlier, root[:, None] * root, torch.diag(n + 1)), root
    if name == "legt":
        sign = torch.where(n[:, None] >= n, 1.0, (-1.0) ** (n[:, None] - n))
        return -0.5 * root[:, None] * root * sign, 0.5 * root
    if name == "lagt":
        return -0.5 * torch.eye(size, dtype=n.dtype, device="cpu") - earlier.to(n.dtype), torch.ones_like(n)
    if name == "fout":
        B = torch.where(n % 2 == 0, n.new_tensor(2.0).sqrt(), 0.0)
        B[0] = 1.0
        return _turns(size) - B[:, None] * B, B
    raise ValueError(f"no HiPPO matrix '{name}': choose one of {', '.join(LOW_RANK)}")


def low_rank(name: str, size: int) -> Tensor:
    """P [rank, size] such that A + sum_r P_r P_r^T is normal: a multiple of 1 plus a skew-symmetric matrix."""
    n = torch.arange(size, dtype=torch.float64, device="cpu")
    if name == "legs":
        return torch.sqrt(n + 0.5)[None]
    if name == "legt":
        half = torch.sqrt(n + 0.5)
        return torch.stack([torch.where(n % 2 == 1, half, 0.0), torch.where(n % 2 == 0, half, 0.0)])
    if name == "lagt":
        return torch.full((1, size), math.sqrt(0.5), dtype=torch.float64, device="cpu")
    return hippo(name, size)[1][None]


@dataclass(frozen=True)
class DiagonalPlusLowRank:
    """A = V (diag(eigenvalues) - P P^*) V^*, of every pair of conjugates the one above the real axis.

    eigenvalues, B: complex128 [size / 2], by rising imaginary part; P: [rank, size / 2]; V: [size, size / 2]. The
    eigenvectors' phases, which are free, are those that make B real and positive.
    """

    eigenvalues: Tensor
    P: Tensor
    B: Tensor
    V: Tensor


@cache
def diagonal_plus_low_rank(name: str, size: int) -> DiagonalPlusLowRank:
    """The form of `hippo(name, size)`, size even."""
    A, B = hippo(name, size)
    P = low_rank(name, size)
    normal = A + P.T @ P
    real_part = normal.diagonal().mean()
    if name == "fout":  # its eigenvalue 0 is double, so that an eigensolver's vectors would be any of a plane
        angles, V = _fourier_vectors(size)
    else:
        skew = normal - real_part * torch.eye(size, dtype=A.dtype, device="cpu")
        angles, V = torch.linalg.eigh(-1j * skew)
        angles, V = angles[size // 2 :], V[:, size // 2 :]
    rotated = V.conj().T @ B.to(V.dtype)
    V = V * (rotated / rotated.abs())
    return DiagonalPlusLowRank(
        eigenvalues=torch.complex(real_part.expand_as(angles), angles),
        P=P.to(V.dtype) @ V.conj(),
        B=V.conj().T @ B.to(V.dtype),
        V=V,
    )


def _turns(size: int) -> Tensor:
    """Blocks [[0, -pi m], [pi m, 0]] for m = 0 .. size/2 - 1."""
    turns = torch.zeros(size, size, dtype=torch.float64, device="cpu")
    for m in range(size // 2):
        turns[2 * m + 1, 2 * m], turns[2 * m, 2 * m + 1] = math.pi * m, -math.pi * m
    return turns


def _fourier_vectors(size: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues' imaginary parts and eigenvectors of `_turns`."""
    V = torch.zeros(size, size // 2, dtype=torch.complex128, device="cpu")
    pair = torch.arange(size // 2, device="cpu")
    V.real[2 * pair, pair], V.imag[2 * pair + 1, pair] = math.sqrt(0.5), -math.sqrt(0.5)
    return math.pi * pair.double(), V
