"""The literal form: every row sorts the keys that it may see."""

import torch
from torch import Tensor


def visible_keys(scores: Tensor, keep: int, causal: bool, sequence_id: Tensor | None) -> Tensor:
    """Which keys (last axis) each query attends to: scores [batch, heads, length] -> bool [batch, heads, length,
    length]. Padding is a sequence of its own."""
    length = scores.shape[-1]
    allowed = torch.ones(length, length, dtype=torch.bool, device=scores.device)
    allowed = (allowed.tril() if causal else allowed)[None, None]
    if sequence_id is not None:
        allowed = allowed & (sequence_id[:, None, :, None] == sequence_id[:, None, None, :])
    # A stable sort leaves the later of two equal keys behind the earlier.
    rows = torch.where(allowed, scores.detach()[:, :, None], -torch.inf)
    best = rows.sort(dim=-1, stable=True).indices[..., -keep:]
    return torch.zeros_like(rows, dtype=torch.bool).scatter(-1, best, True) & allowed


def dynamic_mask_matrix(
    q: Tensor, k: Tensor, key_bias: Tensor, keep: int, causal: bool, sequence_id: Tensor | None
) -> Tensor:
    """The attention weights, [batch, nheads, length, length] in q's dtype; arguments as in `dynamic_mask_attention`."""
    group = q.shape[1] // k.shape[1]
    visible = visible_keys(key_bias, keep, causal, sequence_id).repeat_interleave(group, dim=1)
    scores = q @ k.repeat_interleave(group, dim=1).transpose(-1, -2) * q.shape[-1] ** -0.5
    scores = scores + key_bias.repeat_interleave(group, dim=1)[:, :, None]
    return scores.masked_fill(~visible, -torch.inf).softmax(dim=-1).to(q.dtype)


def dynamic_mask_reference(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, keep: int, causal: bool, sequence_id: Tensor | None
) -> Tensor:
    """See `dynamic_mask_attention`."""
    weights = dynamic_mask_matrix(q, k, key_bias, keep, causal, sequence_id)
    return weights.to(v.dtype) @ v.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
