"""A decoder's cache of at most `keep` entries, in the order of their positions.

k, v: [batch, kv_heads, entries, headdim]; bias: [batch, kv_heads, entries]; real: bool, False for an entry that stands
for padding.
"""

import torch
from torch import Tensor

from anymixer_kernels.dynamic_mask.key_sets import best_keys

Cache = dict[str, Tensor]


def fill_cache(k: Tensor, v: Tensor, key_bias: Tensor, real: Tensor, keep: int) -> Cache:
    """The cache after rows of one sequence each; real: bool [batch, length]. It has min(length, keep) entries."""
    alive = real[:, None].expand_as(key_bias)
    index = best_keys(key_bias, alive, min(keep, key_bias.shape[-1]))
    wide = index[..., None].expand(*index.shape, k.shape[-1])
    return {
        "k": k.gather(2, wide),
        "v": v.gather(2, wide),
        "bias": key_bias.gather(2, index),
        "real": alive.gather(2, index),
    }


def extend_cache(cache: Cache, k: Tensor, v: Tensor, key_bias: Tensor, keep: int) -> Cache:
    """The cache with one key more, [batch, kv_heads, 1, headdim], and without the worst where that is one too many."""
    new = {"k": k, "v": v, "bias": key_bias, "real": torch.ones_like(key_bias, dtype=torch.bool)}
    longer = {name: torch.cat([cache[name], value], dim=2) for name, value in new.items()}
    entries = longer["bias"].shape[2]
    if entries <= keep:
        return longer
    # Of equal ones argmin takes the first, which is the earliest.
    worst = torch.where(longer["real"], longer["bias"], -torch.inf).argmin(dim=2, keepdim=True)
    index = torch.arange(entries - 1, device=worst.device)
    index = index + (index >= worst)
    return {
        name: t.gather(2, index if t.dim() == 3 else index[..., None].expand(*index.shape, t.shape[-1]))
        for name, t in longer.items()
    }
