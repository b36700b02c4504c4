"""Toeplitz mixing in fast PyTorch: a strided view for short rows, Fourier transforms for long ones."""

import torch
from torch import Tensor

from anymixer_kernels.blockwise import mix_in_blocks, wide
from anymixer_kernels.sequences import same_sequence
from anymixer_kernels.toeplitz.reference import toeplitz_from_lags

# Up to here a dense product is cheaper than transforms of twice the length.
DENSE_LENGTH = 512


def toeplitz_torch(below: Tensor, above: Tensor, v: Tensor, sequence_id: Tensor | None) -> Tensor:
    """Arguments as in `toeplitz_mix`."""
    shared = below.dim() == 2
    below, above = below.transpose(-1, -2), above.transpose(-1, -2)
    if sequence_id is not None:
        if not shared:
            return mix_in_blocks(toeplitz_from_lags, [below, above], v, sequence_id)
        matrix = toeplitz_from_lags(below, above, None).expand(v.shape[0], -1, -1, -1)
        return mix_in_blocks(_cut_to_sequences, [matrix], v, sequence_id)
    if v.shape[1] > DENSE_LENGTH:
        return _mix_by_fourier(below, above, v)
    if shared:
        return torch.einsum("htl,blhp->bthp", toeplitz_from_lags(below, above, None).to(v.dtype), v)
    return mix_in_blocks(_from_kernel, [torch.cat([above[..., 1:].flip(-1), below], dim=-1)], v, None)


def _from_kernel(kernel: Tensor, _: None) -> Tensor:
    """The matrix of a kernel over lags 1 - length .. length - 1: [..., 2 length - 1] -> [..., length, length]."""
    length = (kernel.shape[-1] + 1) // 2
    return kernel.flip(-1).unfold(-1, length, 1).flip(-2)


def _cut_to_sequences(matrix: Tensor, sequence_id: Tensor) -> Tensor:
    return torch.where(same_sequence(sequence_id), matrix, 0.0)


def _mix_by_fourier(below: Tensor, above: Tensor, v: Tensor) -> Tensor:
    """The product as a circular convolution of a power-of-two length, in float32 or wider."""
    length = v.shape[1]
    size = 1 << (2 * length - 2).bit_length()
    gap = below.new_zeros(*below.shape[:-1], size - 2 * length + 1)
    kernel = torch.cat([wide(below), wide(gap), wide(above[..., 1:].flip(-1))], dim=-1)
    with torch.autocast(v.device.type, enabled=False):
        spectrum = torch.fft.rfft(kernel)[..., None, :] * torch.fft.rfft(wide(v).permute(0, 2, 3, 1), n=size)
        return torch.fft.irfft(spectrum, n=size)[..., :length].permute(0, 3, 1, 2).to(v.dtype)
