"""Dense mixing: every entry of the matrix is a parameter."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anymixer.errors import UserError
from anymixer.layers.packing import Packing
from anymixer.layers.static_mixing import mix_by_table, table_matrix
from anymixer.mixers.base import register_mixer
from anymixer.mixers.matrix_mixer import MatrixMixerBlock, Structure


class DenseMatrix(Structure):
    """M[h] / sqrt(length) with free M[h] of max_seq_len x max_seq_len."""

    def __init__(self, config: Any, nheads: int, headdim: int) -> None:
        super().__init__(config, nheads, headdim)
        assert config.max_seq_len is not None
        self.M = nn.Parameter(torch.empty(nheads, config.max_seq_len, config.max_seq_len))

    def reset(self) -> None:
        """Normal with standard deviation 0.5, which makes ||MV|| half of ||V||; or Xavier's, as published."""
        if self.config.balanced():
            nn.init.normal_(self.M, std=0.5)
        else:
            nn.init.xavier_normal_(self.M)

    def mix(self, v: Tensor, factors: Tensor, packing: Packing | None) -> Tensor:
        """See `Structure.mix`."""
        return mix_by_table(self.M, v, packing) * self.row_scale(v, packing)

    def matrix(self, v: Tensor, factors: Tensor, packing: Packing | None) -> Tensor:
        """See `Structure.matrix`."""
        return self.scale_rows(table_matrix(self.M, v, packing), v, packing)


@register_mixer("dense")
class Dense(MatrixMixerBlock):
    """A free matrix for every head: data-independent, with max_seq_len squared parameters a head."""

    structure = DenseMatrix
    matrix_mixer_type = "dense"

    @dataclass(kw_only=True)
    class Config(MatrixMixerBlock.Config):
        """is_data_dependent: only False exists. qk_dim: accepted, because published calls pass it; not read."""

        is_data_dependent: bool = False
        qk_dim: int = -1

        def validate(self, d_model: int, path: str) -> None:
            if self.is_data_dependent:
                raise UserError(f"{path}.is_data_dependent: a dense matrix is data-independent; set it to false")
            super().validate(d_model, path)

        def uses_qk_dim(self) -> bool:
            return False
