"""Which keys are kept, without a table of queries by keys.

Going down the rows, a key is kept until `keep` better ones have come, and then never again: it is visible in one
interval of rows. A block of rows therefore sees no key but its own and the `keep` that were kept at the row before it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from anymixer_kernels.sequences import places


def best_keys(scores: Tensor, alive: Tensor, keep: int) -> Tensor:
    """The `keep` best of the keys that are alive, in their order; filled up with others where these are fewer.

    scores: [batch, heads, length], length at least `keep`; alive: bool, broadcastable to it. Returns int64 [batch,
    heads, keep].
    """
    scores = torch.where(alive, scores.detach(), -torch.inf)
    return scores.sort(dim=-1, stable=True).indices[..., -keep:].sort(dim=-1).values


def best_of_each_sequence(scores: Tensor, keep: int, sequence_id: Tensor) -> Tensor:
    """Which keys are among the `keep` best of their sequence: bool [batch, heads, length]."""
    ids = sequence_id[:, None].expand_as(scores)
    order = scores.detach().sort(dim=-1, stable=True).indices
    order = order.gather(-1, ids.gather(-1, order).sort(dim=-1, stable=True).indices)
    # Now sequences stand one after the other, each with its best keys last.
    from_last = places(ids.gather(-1, order).flatten(0, 1).flip(-1)).flip(-1).view_as(order)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, from_last < keep)


@dataclass(frozen=True)
class KeyBlock:
    """What a block of rows may see. index: [batch, heads, keys], positions in increasing order, the block's own last.
    visible: bool [batch, heads, rows, keys]. carried: [batch, heads, up to keep], what the next block sees of them."""

    index: Tensor
    visible: Tensor
    carried: Tensor


def key_block(scores: Tensor, sequence_id: Tensor, carried: Tensor, start: int, stop: int, keep: int) -> KeyBlock:
    """The keys of rows start:stop, given those that were kept at row start - 1 (their positions; of other sequences
    than that row's any may be among them). scores: [batch, heads, length]; sequence_id: [batch, length]."""
    own = torch.arange(start, stop, device=scores.device)
    index = torch.cat([carried, own.expand(*carried.shape[:2], -1)], dim=-1)
    ids = sequence_id[:, None].expand_as(scores).gather(-1, index)
    order = scores.detach().gather(-1, index).sort(dim=-1, stable=True).indices
    rank = order.argsort(dim=-1)  # one number a key, of which none are equal
    new_rank, new_ids = (t[..., None, carried.shape[-1] :] for t in (rank, ids))
    before = sequence_id[:, None, max(start - 1, 0), None]
    better = _better_carried(order, rank, ids == before, carried.shape[-1])[..., None]
    better = better + ((new_rank > rank[..., None]) & (new_ids == ids[..., None])).cumsum(dim=-1, dtype=torch.int32)
    until = start + (better < keep).sum(dim=-1, dtype=torch.int32)  # it is visible from its own row up to this one
    visible = (index[..., None, :] <= own[:, None]) & (until[..., None, :] > own[:, None])
    visible &= new_ids.transpose(-1, -2) == ids[..., None, :]
    last_ids = sequence_id[:, None, stop - 1, None]
    kept = torch.where(ids == last_ids, rank, -1).topk(min(keep, index.shape[-1]), dim=-1).indices
    return KeyBlock(
        index=index,
        visible=visible,
        carried=index.gather(-1, kept.sort(dim=-1).values),
    )


def _better_carried(order: Tensor, rank: Tensor, alive: Tensor, carried: int) -> Tensor:
    """How many of the carried keys (the first `carried`) beat each key; alive: whose sequence theirs is."""
    counts = alive & (torch.arange(alive.shape[-1], device=alive.device) < carried)
    up_to = counts.gather(-1, order).cumsum(dim=-1, dtype=torch.int32)
    above = counts.sum(dim=-1, keepdim=True, dtype=torch.int32) - up_to.gather(-1, rank)
    return torch.where(alive, above, 0)
