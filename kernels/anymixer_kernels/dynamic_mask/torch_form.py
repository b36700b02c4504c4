"""The fast form: a key's bias is one more channel of its head, so any attention kernel computes it, exact gradients
included; where keys are dropped, blocks of rows attend to the keys that are left, length * keep in all."""

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from anymixer_kernels.cached_attention import attend_to_cache
from anymixer_kernels.dynamic_mask.key_sets import best_keys, best_of_each_sequence, key_block


def dynamic_mask_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor,
    keep: int,
    causal: bool,
    sequence_id: Tensor | None,
    packed: bool,
    dropout: float,
) -> Tensor:
    """See `dynamic_mask_attention`."""
    width, scale = v.shape[-1], q.shape[-1] ** -0.5
    heads = _with_bias_channels(q, k, v, key_bias, scale)
    if q.shape[2] <= keep:
        mixed = _dense(*heads, scale, causal, sequence_id, packed, dropout)
    elif causal:
        mixed = causal_blocks(*heads, key_bias, scale, keep, _rows_per_block(keep), sequence_id, dropout)
    else:
        mixed = _among_best(*heads, key_bias, scale, keep, sequence_id, packed, dropout)
    return mixed[..., :width]


def attend_with_bias(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, visible: Tensor) -> Tensor:
    """Attention of one new token with a bias of each key: shapes as in `dynamic_mask_attention`, q with one row;
    visible: bool [batch, kv_heads, 1, length]."""
    width, scale = v.shape[-1], q.shape[-1] ** -0.5
    return attend_to_cache(*_with_bias_channels(q, k, v, key_bias, scale), visible, scale)[..., :width]


def _with_bias_channels(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of one width, in v's dtype, such that scale * q' . k' = scale * q . k + key_bias.

    In 16 bits the bias stands in three channels, which hold its 24 bits together. Flash kernels want widths that are
    multiples of 8, and the same of q, k and v.
    """
    q, k = q.to(v.dtype), k.to(v.dtype)
    rest, parts = key_bias[..., None] / scale, []
    for _ in range(3 if v.dtype.itemsize == 2 else 1):
        parts.append(rest.to(v.dtype))
        rest = rest - parts[-1].to(rest.dtype)
    fill = -(q.shape[-1] + len(parts)) % 8
    q = torch.cat([q, q.new_ones(*q.shape[:-1], len(parts)), q.new_zeros(*q.shape[:-1], fill)], dim=-1)
    return q, pad(torch.cat([k, *parts], dim=-1), (0, fill)), pad(v, (0, len(parts) + fill))


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    visible: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    group = q.shape[1] // k.shape[1]
    if visible is not None and visible.shape[1] > 1:
        visible = visible.repeat_interleave(group, dim=1)
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout, is_causal=is_causal, scale=scale)


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    sequence_id: Tensor | None,
    packed: bool,
    dropout: float,
) -> Tensor:
    """No key is dropped: plain attention, without a mask where rows are whole."""
    if sequence_id is None:
        return _attend(q, k, v, scale, None, dropout, causal)
    if not causal and not packed:
        return _attend(q, k, v, scale, _alive(sequence_id)[:, None, None], dropout)
    visible = (sequence_id[:, :, None] == sequence_id[:, None, :])[:, None]
    return _attend(q, k, v, scale, visible.tril() if causal else visible, dropout)


def _alive(sequence_id: Tensor) -> Tensor:
    """The real keys, or all of a row that is nothing but padding: a softmax over none is NaN."""
    real = sequence_id >= 0
    return real | ~real.any(dim=1, keepdim=True)


def _among_best(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    scale: float,
    keep: int,
    sequence_id: Tensor | None,
    packed: bool,
    dropout: float,
) -> Tensor:
    """Every query sees the same keys of its sequence: they are gathered once, if rows hold one sequence each."""
    if sequence_id is not None and packed:
        same = (sequence_id[:, :, None] == sequence_id[:, None, :])[:, None]
        kept = best_of_each_sequence(scores, keep, sequence_id)
        return _attend(q, k, v, scale, same & kept[:, :, None], dropout)
    ids = scores.new_zeros(scores.shape[0], scores.shape[2], dtype=torch.int64) if sequence_id is None else sequence_id
    alive = _alive(ids)[:, None].expand_as(scores)
    index = best_keys(scores, alive, keep)
    visible = None if sequence_id is None else alive.gather(-1, index)[:, :, None]
    return _attend(q, _gathered(k, index), _gathered(v, index), scale, visible, dropout)


def _rows_per_block(keep: int) -> int:
    """A row costs keep + this many keys, and a key is copied (keep + this many) / this many times."""
    return min(512, max(64, keep // 2))


def causal_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    scale: float,
    keep: int,
    rows: int,
    sequence_id: Tensor | None,
    dropout: float,
) -> Tensor:
    """Blocks of rows over the keys left to them; the first `keep` rows, which drop none, are plain attention."""
    batch, heads, length = scores.shape
    first = None if sequence_id is None else sequence_id[:, :keep]
    head = _dense(q[:, :, :keep], k[:, :, :keep], v[:, :, :keep], scale, True, first, True, dropout)
    ids = scores.new_zeros(batch, length, dtype=torch.int64) if sequence_id is None else sequence_id
    carried, mixed = torch.arange(keep, device=q.device).expand(batch, heads, keep), [head]
    for start in range(keep, length, rows):
        stop = min(start + rows, length)
        block = key_block(scores, ids, carried, start, stop, keep)
        keys, values = _gathered(k, block.index), _gathered(v, block.index)
        mixed.append(_attend(q[:, :, start:stop], keys, values, scale, block.visible, dropout))
        carried = block.carried
    return torch.cat(mixed, dim=2)


def _gathered(heads: Tensor, index: Tensor) -> Tensor:
    """[batch, heads, length, width] and [batch, heads, keys] -> [batch, heads, keys, width]."""
    return heads.gather(2, index[..., None].expand(*index.shape, heads.shape[-1]))
