"""A causal recurrence from both ends of the row at once."""

from collections.abc import Callable

import torch
from torch import Tensor

from anymixer_kernels.blockwise import wide


def mix_both_ways(
    recur: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    sequence_id: Tensor | None,
) -> Tensor:
    """`linear_recurrence_both_ways` by `recur`, which takes (q, k, v, log_decay, sequence_id) and returns y."""
    # Both directions in one call: on a GPU, small shapes are bound by its number.
    ids = None if sequence_id is None else torch.cat([sequence_id, sequence_id.flip(1)])
    queries, keys, values, decays = (torch.cat([t, t.flip(1)]) for t in (q, k, v, log_decay))
    y = recur(queries, keys, values, decays, ids)
    ahead, back = y[: v.shape[0]], y[v.shape[0] :]
    own = (wide(q) * wide(k)).sum(-1).repeat_interleave(v.shape[2] // q.shape[2], dim=2)
    return (wide(ahead) + wide(back.flip(1)) - own[..., None] * wide(v)).to(v.dtype)
