"""Softmax attention as a matrix mixer: between the family's convolution and gate, queries and keys narrower than
values. (`attention` is BERT's own block.)"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from anymixer.layers.packing import Packing
from anymixer.mixers.base import register_mixer
from anymixer.mixers.matrix_mixer import FACTOR_STD, MatrixMixerBlock, Structure


class AttentionMatrix(Structure):
    """softmax_l(q_t . k_l / sqrt(qk_dim))."""

    def __init__(self, config: Any, nheads: int, headdim: int) -> None:
        super().__init__(config, nheads, headdim)
        self.add_position_factors()

    def reset(self) -> None:
        """Balanced: scores with a standard deviation above 1, so that the weights are not all alike."""
        self.reset_position_factors(std=FACTOR_STD)

    def _queries_and_keys(self, v: Tensor, factors: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor]:
        """[batch, nheads, length, qk_dim] each."""
        if self.config.is_data_dependent:
            q, k = self.queries_and_keys(factors)
        elif packing is None:
            batch, length = v.shape[:2]
            q, k = (t[:length].expand(batch, -1, -1, -1) for t in (self.q_matrix, self.k_matrix))
        else:
            q, k = (t[packing.positions()] for t in (self.q_matrix, self.k_matrix))
        return q.transpose(1, 2).to(v.dtype), k.transpose(1, 2).to(v.dtype)

    def mix(self, v: Tensor, factors: Tensor, packing: Packing | None) -> Tensor:
        """See `Structure.mix`."""
        q, k = self._queries_and_keys(v, factors, packing)
        mask = None if packing is None else packing.visible_keys()
        return scaled_dot_product_attention(q, k, v.transpose(1, 2), attn_mask=mask).transpose(1, 2)

    def matrix(self, v: Tensor, factors: Tensor, packing: Packing | None) -> Tensor:
        """See `Structure.matrix`."""
        q, k = self._queries_and_keys(v, factors, packing)
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.config.qk_dim)
        if packing is not None:
            scores = scores.masked_fill(~packing.visible_keys(), -torch.inf)
        return scores.softmax(dim=-1)


@register_mixer("matrix_attention")
class MatrixAttention(MatrixMixerBlock):
    """Softmax attention with the convolution and gate of the matrix-mixer family."""

    structure = AttentionMatrix
    matrix_mixer_type = "attention"
