"""The linear recurrence in chunks: a dense product inside each, a scan of states between them. Linear in length.

Inside a chunk every exponent is a sum of log-decays between two tokens, so nothing overflows, however strong the decay.
With one decay a head that is a factor of the matrix. With one a dimension it is not, and splitting exp(G_t - G_s) into
exp(G_t) exp(-G_s) would overflow: tokens are taken in sub-blocks, each measured from its own start (Gated Linear
Attention, arXiv 2312.06635, section 4.3), and within a sub-block entry by entry.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from anymixer_kernels.blockwise import wide

SUB_BLOCK = 16


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
        weights = _weights_per_dimension(q, k, total) if per_dimension else _weights(q, k, total, nheads)
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
    """sum_n q_tn k_sn exp(total_tn - total_sn) for s <= t: [batch, chunks, nheads, chunk_size, chunk_size]."""
    size = total.shape[-2]
    rows = []
    for start in range(0, size, SUB_BLOCK):
        block = slice(start, start + SUB_BLOCK)
        # Decay up to the block's first token: what lies before is measured to it, the block's tokens from it.
        origin = total[..., start : start + 1, :]
        reader = wide(q[..., block, :]) * (total[..., block, :] - origin).exp()
        source = wide(k[..., :start, :]) * (origin - total[..., :start, :]).exp()
        own = _entry_by_entry(wide(q[..., block, :]), wide(k[..., block, :]), total[..., block, :])
        later = own.new_zeros(*own.shape[:-1], size - start - SUB_BLOCK)
        rows.append(torch.cat([reader @ source.transpose(-1, -2), own, later], dim=-1))
    return torch.cat(rows, dim=-2)


def _entry_by_entry(q: Tensor, k: Tensor, total: Tensor) -> Tensor:
    """The same within one sub-block, [..., SUB_BLOCK, SUB_BLOCK], a column at a time."""
    columns = []
    for s in range(q.shape[-2]):
        exponent = total[..., s:, :] - total[..., s : s + 1, :]
        column = (q[..., s:, :] * k[..., s : s + 1, :] * exponent.exp()).sum(-1)
        columns.append(pad(column, (s, 0)))
    return torch.stack(columns, dim=-1)


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
