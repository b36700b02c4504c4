"""Cauchy mixing: entries are reciprocals of sums of positive numbers, one per token each."""

import math
from typing import Any

import torch
from anymixer_kernels.cauchy import cauchy_matrix, cauchy_mix
from anymixer_kernels.row_scale import finish_rows
from torch import Tensor, nn

from anymixer.layers.packing import Packing
from anymixer.layers.static_mixing import mix_by_table, table_matrix
from anymixer.mixers.base import register_mixer
from anymixer.mixers.matrix_mixer import MatrixMixerBlock, Structure

# Added to every denominator, as published.
EPSILON = 1e-8
REFERENCE_BIAS = 0.5


class CauchyMatrix(Structure):
    """sum_d 1 / (exp(q[t,d]) + exp(k[l,d]) + 2 bias) / sqrt(length qk_dim); bias is 0 where q and k are parameters."""

    def __init__(self, config: Any, nheads: int, headdim: int) -> None:
        super().__init__(config, nheads, headdim)
        self.add_position_factors()
        if config.is_data_dependent:
            self.bias = nn.Parameter(torch.empty(()))

    def reset(self) -> None:
        """Balanced: denominators start near 2 sqrt(qk_dim), which makes ||MV|| about half of ||V||."""
        size = math.sqrt(self.config.qk_dim)
        if self.config.is_data_dependent:
            bias = max(REFERENCE_BIAS, size - 1.5) if self.config.balanced() else REFERENCE_BIAS
            nn.init.constant_(self.bias, bias)
        self.reset_position_factors(mean=math.log(size), std=0.5)

    def _factors(self, v: Tensor, factors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k [batch or 1, length, nheads, qk_dim], and what every denominator is shifted by."""
        if not self.config.is_data_dependent:
            length = v.shape[1]
            shift = torch.full((), EPSILON, device=v.device, dtype=self.q_matrix.dtype)
            return self.q_matrix[None, :length], self.k_matrix[None, :length], shift
        # A negative bias would put poles into the matrix; the gradient passes, so that it can come back.
        bias = self.bias + (self.bias.clamp(min=0.0) - self.bias).detach()
        return *self.queries_and_keys(factors), 2 * bias + EPSILON

    def mix(self, v: Tensor, factors: Tensor, packing: Packing | None) -> Tensor:
        """See `Structure.mix`."""
        return self._mix(v, factors, packing, residual=False)

    def mix_and_add(self, v: Tensor, factors: Tensor, packing: Packing | None) -> Tensor:
        """See `Structure.mix_and_add`."""
        return self._mix(v, factors, packing, residual=True)

    def _mix(self, v: Tensor, factors: Tensor, packing: Packing | None, residual: bool) -> Tensor:
        q, k, shift = self._factors(v, factors)
        scale = self.scale_of_rows(v, packing, self.config.qk_dim)
        if self.config.is_data_dependent:
            # Rows of one sequence need no mask: v is zero where they are padded.
            ids = packing.sequence_id if packing is not None and packing.packed else None
            return cauchy_mix(q, k, v, shift, ids, scale=scale, residual=residual)
        return finish_rows(mix_by_table(cauchy_matrix(q, k, shift)[0], v, packing), v, scale, residual)

    def matrix(self, v: Tensor, factors: Tensor, packing: Packing | None) -> Tensor:
        """See `Structure.matrix`."""
        q, k, shift = self._factors(v, factors)
        if self.config.is_data_dependent:
            matrix = cauchy_matrix(q, k, shift, None if packing is None else packing.sequence_id)
        else:
            matrix = table_matrix(cauchy_matrix(q, k, shift)[0], v, packing)
        return self.scale_rows(matrix, v, packing, self.config.qk_dim)


@register_mixer("cauchy")
class Cauchy(MatrixMixerBlock):
    """A Cauchy matrix for every head, in its positive form, summed over qk_dim dimensions."""

    structure = CauchyMatrix
    matrix_mixer_type = "cauchy"
