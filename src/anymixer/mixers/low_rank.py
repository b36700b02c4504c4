"""Low-rank mixing: M = Q K^T without a softmax, linear in length."""

from typing import Any

import torch
from anymixer_kernels.blockwise import mix_in_blocks
from anymixer_kernels.sequences import same_sequence
from torch import Tensor

from anymixer.layers.packing import Packing
from anymixer.layers.static_mixing import mix_by_table, table_matrix
from anymixer.mixers.base import register_mixer
from anymixer.mixers.matrix_mixer import MatrixMixerBlock, Structure


class LowRankMatrix(Structure):
    """q_t . k_l / sqrt(length qk_dim): rank at most qk_dim."""

    activates = True

    def __init__(self, config: Any, nheads: int, headdim: int) -> None:
        super().__init__(config, nheads, headdim)
        self.add_position_factors()

    def reset(self) -> None:
        """Balanced: entries of q . k / sqrt(qk_dim) with standard deviation 0.5."""
        self.reset_position_factors(std=0.5**0.5)

    def _table(self, length: int) -> Tensor:
        return torch.einsum("thd,lhd->htl", self.q_matrix[:length], self.k_matrix[:length])

    def mix(self, v: Tensor, factors: Tensor, packing: Packing | None) -> Tensor:
        """See `Structure.mix`."""
        if not self.config.is_data_dependent:
            mixed = mix_by_table(self._table(v.shape[1]), v, packing)
        else:
            q, k = (t.transpose(1, 2) for t in self.queries_and_keys(factors))
            if packing is not None and packing.packed:
                mixed = mix_in_blocks(_masked_product, [q, k], v, packing.sequence_id)
            else:  # v is zero at padding, so K^T V needs no mask
                mixed = (q @ (k.transpose(-1, -2) @ v.transpose(1, 2))).transpose(1, 2)
        return mixed * self.row_scale(v, packing, self.config.qk_dim)

    def matrix(self, v: Tensor, factors: Tensor, packing: Packing | None) -> Tensor:
        """See `Structure.matrix`."""
        if not self.config.is_data_dependent:
            matrix = table_matrix(self._table(v.shape[1]), v, packing)
        else:
            q, k = (t.transpose(1, 2) for t in self.queries_and_keys(factors))
            matrix = q @ k.transpose(-1, -2)
            if packing is not None:
                matrix = torch.where(same_sequence(packing.sequence_id), matrix, 0.0)
        return self.scale_rows(matrix, v, packing, self.config.qk_dim)


def _masked_product(q: Tensor, k: Tensor, sequence_id: Tensor) -> Tensor:
    return torch.where(same_sequence(sequence_id), q @ k.transpose(-1, -2), 0.0)


@register_mixer("low_rank")
class LowRank(MatrixMixerBlock):
    """A matrix of rank qk_dim for every head: linear attention without normalisation."""

    structure = LowRankMatrix
    matrix_mixer_type = "low_rank"
