"""Attention of one new token to the keys and values that a cache holds."""

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

# Without cuDNN's, which PyTorch prefers on some GPUs: it makes a plan for every new length, so for every token.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend_to_cache(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T, masked) v of a decoding step.

    q: [batch, num_heads, 1, width]; k, v: [batch, num_kv_heads, cached, width]; mask: [batch or 1, 1 or num_kv_heads or
    num_heads, 1, cached], bool (may be seen) or float (added to the scores); scale: 1 / sqrt(width) if None. Returns
    q's shape.
    """
    batch, heads, _, width = q.shape
    kv_heads = k.shape[1]
    # The queries of one key head are rows of one product: no copy of the cache for each of them.
    rows = q.reshape(batch, kv_heads, heads // kv_heads, width)
    if mask.shape[1] == heads:
        mask = mask.reshape(mask.shape[0], kv_heads, heads // kv_heads, mask.shape[3])
    with sdpa_kernel(BACKENDS):
        return scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale).reshape(q.shape)
