"""Low-rank mixing: M = Q K^T without a softmax, linear in length."""

from typing import Any

import torch
from anymixer_kernels.low_rank import low_rank_matrix, low_rank_mix
from anymixer_kernels.row_scale import finish_rows
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
        return self._mix(v, factors, packing, residual=False)

    def mix_and_add(self, v: Tensor, factors: Tensor, packing: Packing | None) -> Tensor:
        """See `Structure.mix_and_add`."""
        return self._mix(v, factors, packing, residual=True)

    def _mix(self, v: Tensor, factors: Tensor, packing: Packing | None, residual: bool) -> Tensor:
        scale = self.scale_of_rows(v, packing, self.config.qk_dim)
        if self.config.is_data_dependent:
            # Rows of one sequence need no mask: v is zero where they are padded.
            ids = packing.sequence_id if packing is not None and packing.packed else None
            return low_rank_mix(*self.queries_and_keys(factors), v, ids, scale=scale, residual=residual)
        return finish_rows(mix_by_table(self._table(v.shape[1]), v, packing), v, scale, residual)

    def matrix(self, v: Tensor, factors: Tensor, packing: Packing | None) -> Tensor:
        """See `Structure.matrix`."""
        if not self.config.is_data_dependent:
            matrix = table_matrix(self._table(v.shape[1]), v, packing)
        else:
            ids = None if packing is None else packing.sequence_id
            matrix = low_rank_matrix(*self.queries_and_keys(factors), ids)
        return self.scale_rows(matrix, v, packing, self.config.qk_dim)


@register_mixer("low_rank")
class LowRank(MatrixMixerBlock):
    """A matrix of rank qk_dim for every head: linear attention without normalisation."""

    structure = LowRankMatrix
    matrix_mixer_type = "low_rank"
