"""Y = M V with a matrix that is built block by block, and again in the backward pass, so that none is kept.

A data-dependent M has an entry for every sample, head and pair of tokens: more than anything else of a mixer, and
building it takes several tensors of that size. Blocks of samples and heads keep all of them small.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Entries of M worked on at once: about a core's cache on a CPU; on a GPU enough work to fill it.
BLOCK_ENTRIES = {"cpu": 2**18, "cuda": 2**23}


def mix_in_blocks(
    build: Callable[..., Tensor], factors: Sequence[Tensor], v: Tensor, sequence_id: Tensor | None
) -> Tensor:
    """Y = M V for M = build(*factors, sequence_id).

    build: from blocks of the factors and of sequence_id to M [samples, heads, length, length], without autocast.
    factors: each [batch, nheads, length, ...]. v: [batch, length, nheads, headdim]. sequence_id: [batch,
    length] or None. Returns [batch, length, nheads, headdim] in v's dtype.
    """
    batch, length, nheads, _ = v.shape
    values = v.transpose(1, 2)
    rows = []
    for samples, heads in _blocks(batch, nheads, length, v.device.type):
        ids = None if sequence_id is None else sequence_id[samples]
        parts = [factor[samples, heads] for factor in factors]
        block = checkpoint(
            _product, build, values[samples, heads], ids, *parts, use_reentrant=False, preserve_rng_state=False
        )
        rows.append(block)
    return _joined(rows, batch, nheads).transpose(1, 2)


def _blocks(batch: int, nheads: int, length: int, device: str) -> Iterator[tuple[slice, slice]]:
    """Slices of samples and heads with about BLOCK_ENTRIES entries of M each: all heads, or one sample's alone."""
    budget = BLOCK_ENTRIES.get(device, 2**23)
    samples = max(1, budget // (nheads * length * length))
    heads = nheads if samples > 1 else max(1, min(nheads, budget // (length * length)))
    for start in range(0, batch, samples):
        for head in range(0, nheads, heads):
            yield slice(start, start + samples), slice(head, head + heads)


def _joined(blocks: list[Tensor], batch: int, nheads: int) -> Tensor:
    """Put blocks, heads running fastest, together: [batch, nheads, length, headdim]."""
    whole_heads = blocks[0].shape[1] == nheads
    if whole_heads:
        return torch.cat(blocks)
    per_sample = len(blocks) // batch
    return torch.cat([torch.cat(blocks[i : i + per_sample], 1) for i in range(0, len(blocks), per_sample)])


def _product(build: Callable[..., Tensor], values: Tensor, sequence_id: Tensor | None, *factors: Tensor) -> Tensor:
    with torch.autocast(values.device.type, enabled=False):
        return build(*factors, sequence_id).to(values.dtype) @ values


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is in float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
