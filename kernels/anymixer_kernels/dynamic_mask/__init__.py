"""Softmax attention with a learned bias of each key, over the `keep` keys of greatest bias (Dynamic Mask Attention,
arXiv 2412.11834):

    Y_t = softmax_j(q_t . k_j / sqrt(headdim) + bias_j) V        j in top_keep{bias_j : j that t may see}

A query may see the keys of its own sequence, those up to itself when `causal`. Of equal biases the later key is kept,
so that equal biases throughout are a sliding window. As the bias knows nothing of the query, a key that is dropped
never comes back: a cache of `keep` entries is all that a decoder needs.
"""

from torch import Tensor

from anymixer_kernels.backend import current_backend, runs_without_triton
from anymixer_kernels.dynamic_mask.cache import extend_cache, fill_cache
from anymixer_kernels.dynamic_mask.reference import dynamic_mask_matrix, dynamic_mask_reference
from anymixer_kernels.dynamic_mask.torch_form import attend_with_bias, dynamic_mask_torch

__all__ = ["attend_with_bias", "dynamic_mask_attention", "dynamic_mask_matrix", "extend_cache", "fill_cache"]


def dynamic_mask_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor,
    *,
    keep: int,
    causal: bool,
    sequence_id: Tensor | None = None,
    packed: bool = True,
    dropout: float = 0.0,
) -> Tensor:
    """Mix `v` along its length.

    q: [batch, nheads, length, headdim]; k, v: [batch, kv_heads, length, headdim], head h reads kv head
    h // (nheads // kv_heads); key_bias: [batch, kv_heads, length] in float32 or wider. keep: keys that a query sees at
    most, 1 or more. sequence_id: [batch, length], -1 for padding; packed: False promises that each row holds at most
    one sequence, which is cheaper. dropout: of the attention weights, not in the reference. Returns q's shape in v's
    dtype; rows at padding are meaningless but finite. The choice of keys has no gradient, their bias has.
    """
    runs_without_triton(q, "dynamic mask attention")
    if current_backend() == "reference":
        return dynamic_mask_reference(q, k, v, key_bias, keep, causal, sequence_id)
    return dynamic_mask_torch(q, k, v, key_bias, keep, causal, sequence_id, packed, dropout)
