"""Convolutions in fast PyTorch: Toeplitz products for short and for packed rows, Fourier transforms for long ones."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from anymixer_kernels.blockwise import mix_in_blocks, wide
from anymixer_kernels.sequences import same_sequence

# Up to here a product with every channel's matrix takes the place of transforms of twice the length. On one core of a
# CPU (8 rows, 256 channels, forward and backward) transforms were measured at half the time for 64 tokens and a tenth
# for 512; the GPU's number is an estimate.
DENSE_LENGTH = {"cpu": 32, "cuda": 128}
# Tokens of a packed row that are taken together: only among them is there a matrix for every sample.
PACKED_CHUNK = 32


def lti_mix_torch(below: Tensor, v: Tensor, above: Tensor | None, sequence_id: Tensor | None) -> Tensor:
    """Arguments as in `lti_mix`; v is zero at padding."""
    length = v.shape[1]
    if sequence_id is not None:
        return _packed(two_sided(below, above, -length % PACKED_CHUNK), v, above is not None, sequence_id)
    if length <= DENSE_LENGTH.get(v.device.type, 128):
        return _product(two_sided(below, above), v)
    return _by_fourier(below, v, above)


def two_sided(below: Tensor, above: Tensor | None, extra: int = 0) -> Tensor:
    """One row of lags 1 - size .. size - 1 a channel, size = length + extra; 0 where there is no lag."""
    before = torch.zeros_like(below[:, 1:]) if above is None else above[:, : below.shape[1] - 1].flip(-1)
    return pad(torch.cat([before, below], dim=-1), (extra, extra))


def _product(lags: Tensor, v: Tensor) -> Tensor:
    """lags: [channels, 2 length - 1]; v: [..., length, channels]. The matrix is a view; the tokens are turned round."""
    length = v.shape[-2]
    windows = lags.to(v.dtype).unfold(-1, length, 1)
    turned = v.flip(-2).movedim(-1, 0)
    mixed = windows @ turned.flatten(1, -2).transpose(1, 2)
    return mixed.transpose(1, 2).unflatten(1, turned.shape[1:-1]).movedim(0, -1)


def _by_fourier(below: Tensor, v: Tensor, above: Tensor | None) -> Tensor:
    """A circular convolution of a power-of-two length, in float32 or wider."""
    length = v.shape[1]
    size = 1 << (2 * length - 2).bit_length()
    kernel = wide(below)
    if above is not None:
        before = wide(above)[:, : length - 1].flip(-1)
        kernel = torch.cat([pad(kernel, (0, size - 2 * length + 1)), before], dim=-1)
    spectrum = torch.fft.rfft(kernel, n=size) * torch.fft.rfft(wide(v).transpose(1, 2), n=size)
    return torch.fft.irfft(spectrum, n=size)[..., :length].transpose(1, 2).to(v.dtype)


def _packed(lags: Tensor, v: Tensor, both_sides: bool, sequence_id: Tensor) -> Tensor:
    """Within a chunk, every sample's matrix is cut to its sequences. Between chunks no matrix has to be cut: two tokens
    of different chunks share a sequence if one is of its chunk's last sequence and the other of its chunk's first, and
    these are one."""
    length, size = v.shape[1], PACKED_CHUNK
    extra = -length % size
    zero = length + extra - 1  # where lag 0 is
    v = pad(v, (0, 0, 0, extra)).unflatten(1, (-1, size))
    ids = pad(sequence_id, (0, extra), value=-1).unflatten(1, (-1, size))
    chunks = v.shape[1]

    own = lags[:, zero - size + 1 : zero + size].expand(v.shape[0] * chunks, -1, -1)
    flat = mix_in_blocks(_cut_to_sequences, [own], v.flatten(0, 1)[..., None], ids.flatten(0, 1))
    mixed = flat[..., 0].unflatten(0, (-1, chunks))
    first, last = ids == ids[..., :1], ids == ids[..., -1:]
    leaving, arriving = torch.where(last[..., None], v, 0.0), torch.where(first[..., None], v, 0.0)
    for apart in range(1, chunks):
        one = (ids[:, :-apart, -1] == ids[:, apart:, 0])[..., None]
        from_before = _product(_window(lags, zero + apart * size, size), leaving[:, :-apart])
        mixed = mixed + pad(torch.where((first[:, apart:] & one)[..., None], from_before, 0.0), (0, 0, 0, 0, apart, 0))
        if both_sides:
            from_later = _product(_window(lags, zero - apart * size, size), arriving[:, apart:])
            mixed = mixed + pad(
                torch.where((last[:, :-apart] & one)[..., None], from_later, 0.0), (0, 0, 0, 0, 0, apart)
            )
    return mixed.flatten(1, 2)[:, :length]


def _window(lags: Tensor, center: int, size: int) -> Tensor:
    return lags[:, center - size + 1 : center + size]


def _cut_to_sequences(lags: Tensor, sequence_id: Tensor) -> Tensor:
    matrix = lags.unfold(-1, sequence_id.shape[1], 1).flip(-1)
    return torch.where(same_sequence(sequence_id), matrix, 0.0)
