"""Mixing by a table of [nheads, places, places] that all rows share, each sequence from its own first place."""

import torch
from anymixer_kernels.blockwise import mix_in_blocks
from anymixer_kernels.sequences import places, same_sequence
from torch import Tensor

from anymixer.layers.packing import Packing


def mix_by_table(table: Tensor, v: Tensor, packing: Packing | None) -> Tensor:
    """Y = M V, M[b,h,t,l] = table[h, place of t, place of l] within a sequence and 0 elsewhere.

    table: [nheads, places, places], places at least the length. v: [batch, length, nheads, headdim], zero at
    padding. Returns v's shape and dtype.
    """
    if packing is not None and packing.packed:
        shared = table.expand(v.shape[0], -1, -1, -1)
        return mix_in_blocks(_gather_entries, [shared], v, packing.sequence_id)
    length = v.shape[1]
    square = table[:, :length, :length].to(v.dtype)
    if packing is None:
        return torch.einsum("htl,blhp->bthp", square, v)
    return unaligned(torch.einsum("htl,blhp->bthp", square, aligned(v, packing)), packing)


def table_matrix(table: Tensor, v: Tensor, packing: Packing | None) -> Tensor:
    """M itself: [batch, nheads, length, length]; arguments as in `mix_by_table`."""
    batch, length = v.shape[:2]
    shared = table.expand(batch, -1, -1, -1)
    if packing is None:
        return shared[:, :, :length, :length]
    return _gather_entries(shared, packing.sequence_id)


def _gather_entries(table: Tensor, sequence_id: Tensor) -> Tensor:
    """[batch, nheads, places, places] and [batch, length] -> [batch, nheads, length, length]."""
    index = places(sequence_id)
    batch, length = index.shape
    # A padding's place counts from the padding's start, so it too is below the length.
    rows = table.gather(2, index[:, None, :, None].expand(batch, table.shape[1], length, table.shape[3]))
    entries = rows.gather(3, index[:, None, None, :].expand(batch, table.shape[1], length, length))
    return torch.where(same_sequence(sequence_id), entries, 0.0)


def aligned(x: Tensor, packing: Packing) -> Tensor:
    """Rotate rows of one sequence each so that it begins at position 0: [batch, length, ...] -> the same shape."""
    return _rotated(x, packing.real.int().argmax(dim=1))


def unaligned(x: Tensor, packing: Packing) -> Tensor:
    """Undo `aligned`."""
    return _rotated(x, -packing.real.int().argmax(dim=1))


def _rotated(x: Tensor, start: Tensor) -> Tensor:
    length = x.shape[1]
    index = (torch.arange(length, device=x.device) + start[:, None]) % length
    return x.gather(1, index.view(*index.shape, *[1] * (x.dim() - 2)).expand_as(x))
