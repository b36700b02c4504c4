"""The linear recurrence in chunks: a dense product inside each, a scan of states between them. Linear in length.

Inside a chunk every exponent is a sum of log-decays between two tokens, so nothing overflows, however strong the decay.
With one decay a head that is a factor of the matrix. With one a dimension it is not, and splitting exp(G_t - G_s) into
exp(G_t) exp(-G_s) would overflow: tokens are taken in sub-blocks, each measured from its own start (Gated Linear
Attention, arXiv 2312.06635, section 4.3), these in smaller ones, and the smallest are split, which then is safe.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from anymixer_kernels.blockwise import wide

SUB_BLOCK = 16
SMALLEST_BLOCK = 4
# Log-decay of a token, at most: three of them, halved, leave room for the sizes of q and k.
STRONGEST = {torch.float32: 40.0, torch.float64: 400.0}


def linear_recurrence_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    sequence_id: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """y and the last state; arguments as in `linear_recurrence`."""
    length, nheads = v.shape[1:3]
    per_dimension = log_decay.dim() == 4
    chunk_size = min(-(-length // SUB_BLOCK) * SUB_BLOCK, max(chunk_size // SUB_BLOCK, 1) * SUB_BLOCK)
    # On the left, so that the last state is that of the last token.
    extra = -length % chunk_size
    if sequence_id is not None:
        v = torch.where((sequence_id >= 0)[..., None, None], v, 0.0)
    q, k, values = (_chunks(t, extra, chunk_size) for t in (q, k, v))
    ids = None if sequence_id is None else _chunks(sequence_id, extra, chunk_size, value=-1)
    total = _chunks(wide(log_decay), extra, chunk_size).cumsum(-2 if per_dimension else -1)

    with torch.autocast(v.device.type, enabled=False):
        weights = _weights_per_dimension(wide(q), wide(k), total) if per_dimension else _weights(q, k, total, nheads)
    if ids is not None:
        weights = torch.where((ids[..., :, None] == ids[..., None, :])[:, :, None], weights, 0.0)
    inside = weights.to(v.dtype) @ values
    across, state = _across_chunks(q, k, values, total if per_dimension else total[..., None], ids, initial_state)
    y = (inside + across.to(v.dtype)).transpose(2, 3).flatten(1, 2)[:, extra:]
    return y, state


def _chunks(tensor: Tensor, extra: int, chunk_size: int, value: int = 0) -> Tensor:
    """[batch, length, heads, ...] -> [batch, chunks, heads, chunk_size, ...], `extra` positions of `value` before;
    [batch, length] -> [batch, chunks, chunk_size]."""
    padded = pad(tensor, (0, 0) * (tensor.dim() - 2) + (extra, 0), value=value).unflatten(1, (-1, chunk_size))
    return padded.transpose(2, 3) if padded.dim() > 3 else padded


def _weights(q: Tensor, k: Tensor, total: Tensor, nheads: int) -> Tensor:
    """(q_t . k_s) exp(total_t - total_s) for s <= t: [batch, chunks, nheads, chunk_size, chunk_size]."""
    size = total.shape[-1]
    past = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~past, -torch.inf).exp()
    similar = wide(q) @ wide(k).transpose(-1, -2)
    ngroups = q.shape[2]
    return (decay.unflatten(2, (ngroups, nheads // ngroups)) * similar[:, :, :, None]).flatten(2, 3)


def _weights_per_dimension(q: Tensor, k: Tensor, total: Tensor) -> Tensor:
    """sum_n q_tn k_sn exp(total_tn - total_sn) for s <= t: [..., size, size], of q, k, total [..., size, d_state]."""
    size = total.shape[-2]
    if size <= SMALLEST_BLOCK:
        return _factored(q, k, total)
    length = SUB_BLOCK if size > SUB_BLOCK else SMALLEST_BLOCK
    # All blocks at once: on a GPU, small shapes are bound by the number of operations.
    owns = _weights_per_dimension(*(t.unflatten(-2, (-1, length)) for t in (q, k, total))).unbind(-3)
    rows = []
    for start, own in zip(range(0, size, length), owns):
        block = slice(start, start + length)
        # Decay up to the block's first token: what lies before is measured to it, the block's tokens from it.
        origin = total[..., start : start + 1, :]
        reader = q[..., block, :] * (total[..., block, :] - origin).exp()
        source = k[..., :start, :] * (origin - total[..., :start, :]).exp()
        later = own.new_zeros(*own.shape[:-1], size - start - length)
        rows.append(torch.cat([reader @ source.transpose(-1, -2), own, later], dim=-1))
    return torch.cat(rows, dim=-2)


def _factored(q: Tensor, k: Tensor, total: Tensor) -> Tensor:
    """The same for so few tokens that exp(total_t - total_s) may be split into two factors, measured from the middle.

    A decay of less than exp(-STRONGEST) a token, which no sum in this precision would notice, is taken for that.
    """
    steps = total.diff(dim=-2).clamp(min=-STRONGEST[total.dtype])
    since = pad(steps.cumsum(-2), (0, 0, 1, 0))
    middle = since[..., -1:, :] / 2
    reader, source = q * (since - middle).exp(), k * (middle - since).exp()
    # What is cut off may have overflowed.
    return (reader @ source.transpose(-1, -2)).tril()


def _across_chunks(
    q: Tensor, k: Tensor, values: Tensor, total: Tensor, ids: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What earlier chunks bring in, [batch, chunks, nheads, chunk_size, headdim], and the state after the last.

    total: [batch, chunks, nheads, chunk_size, 1 or d_state]. The state that leaves a chunk is that of its last token's
    sequence; it is carried on, and read, only where that sequence goes on.
    """
    nheads, ngroups = values.shape[2], q.shape[2]
    left, keep, read = (total[..., -1:, :] - total).exp(), total[..., -1, :].exp(), total.exp()
    if ids is not None:
        leaving = ids[:, :, -1]
        arriving = pad(leaving[:, :-1], (1, 0), value=-1)
        left = left * (ids == leaving[..., None])[:, :, None, :, None]
        keep = keep * (leaving == arriving)[..., None, None]
        read = read * (ids == arriving[..., None])[:, :, None, :, None]
    q, k = (wide(t).repeat_interleave(nheads // ngroups, dim=2) for t in (q, k))
    gained = (k * left).transpose(-1, -2) @ wide(values)
    state = torch.zeros_like(gained[:, 0]) if initial_state is None else wide(initial_state)
    starts = []
    for chunk in range(gained.shape[1]):
        starts.append(state)
        state = keep[:, chunk, ..., None] * state + gained[:, chunk]
    return (q * read) @ torch.stack(starts, dim=1), state
