"""Vandermonde mixing: entries are sums of cosines whose frequencies belong to rows and columns; the discrete Fourier
transform is the one whose frequencies are fixed."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from anymixer_kernels.backend import takes_triton
from anymixer_kernels.row_scale import finish_rows
from anymixer_kernels.sequences import same_sequence
from anymixer_kernels.vandermonde import vandermonde_matrix, vandermonde_mix
from torch import Tensor, nn

from anymixer.errors import UserError
from anymixer.layers.packing import Packing
from anymixer.layers.static_mixing import aligned, mix_by_table, table_matrix, unaligned
from anymixer.mixers.base import register_mixer
from anymixer.mixers.matrix_mixer import FACTOR_STD, MatrixMixerBlock, Structure

# Turns per position of a data-dependent factor of 1, as published.
FREQUENCY = 1e-3


class VandermondeMatrix(Structure):
    """Data-dependent: sum_d cos(2 pi eps q[t,d] l) - cos(2 pi eps k[l,d] t), eps = 1e-3; data-independent:
    sum_d cos(2 pi q[d,t] l) + cos(2 pi k[d,l] t); both / sqrt(2 length qk_dim)."""

    def __init__(self, config: Any, nheads: int, headdim: int) -> None:
        super().__init__(config, nheads, headdim)
        if not config.is_data_dependent:
            assert config.max_seq_len is not None
            self.q_bias = nn.Parameter(torch.empty(nheads, config.qk_dim, config.max_seq_len))
            self.k_bias = nn.Parameter(torch.empty(nheads, config.qk_dim, config.max_seq_len))

    def reset(self) -> None:
        """Balanced: frequencies over the whole band, one in each of qk_dim equal parts, which keeps ||MV|| below ||V||
        although the first column is all ones. Published: zeros, whose gradient is zero for ever."""
        if self.config.is_data_dependent:
            return
        parts = self.config.qk_dim
        for bias in (self.q_bias, self.k_bias):
            if self.config.balanced():
                part = torch.arange(parts, device=bias.device, dtype=bias.dtype)[:, None]
                bias.copy_((part + torch.rand_like(bias)) / parts - 0.5)
            else:
                nn.init.zeros_(bias)

    def factor_std(self) -> float:
        """Short sequences get faster cosines, which would otherwise cancel: at 128 places and more none."""
        return FACTOR_STD * max(1.0, 128 / (self.config.max_seq_len or 128))

    def _table(self, length: int) -> Tensor:
        """[nheads, length, length]."""
        wide = torch.promote_types(self.q_bias.dtype, torch.float32)
        place = torch.arange(length, device=self.q_bias.device, dtype=wide)
        table = torch.zeros((), device=self.q_bias.device, dtype=wide)
        q, k = (bias[..., :length].to(wide).unbind(1) for bias in (self.q_bias, self.k_bias))
        for row, column in zip(q, k):
            table = table + torch.cos(2 * math.pi * row[:, :, None] * place)
            table = table + torch.cos(2 * math.pi * column[:, None, :] * place[:, None])
        return table

    def mix(self, v: Tensor, factors: Tensor, packing: Packing | None) -> Tensor:
        """See `Structure.mix`."""
        return self._mix(v, factors, packing, residual=False)

    def mix_and_add(self, v: Tensor, factors: Tensor, packing: Packing | None) -> Tensor:
        """See `Structure.mix_and_add`."""
        return self._mix(v, factors, packing, residual=True)

    def _mix(self, v: Tensor, factors: Tensor, packing: Packing | None, residual: bool) -> Tensor:
        scale = self.scale_of_rows(v, packing, 2 * self.config.qk_dim)
        if not self.config.is_data_dependent:
            mixed = mix_by_table(self._table(v.shape[1]), v, packing)
        elif packing is None or packing.packed or takes_triton(v, "Vandermonde mixing"):
            ids = None if packing is None else packing.sequence_id
            q, k = self.queries_and_keys(factors)
            return vandermonde_mix(q, k, v, FREQUENCY, ids, scale=scale, residual=residual)
        else:  # moved to the start of its row, a sequence counts its places like the row, and v is zero after it
            q, k = self.queries_and_keys(aligned(factors, packing))
            mixed = unaligned(vandermonde_mix(q, k, aligned(v, packing), FREQUENCY), packing)
        return finish_rows(mixed, v, scale, residual)

    def matrix(self, v: Tensor, factors: Tensor, packing: Packing | None) -> Tensor:
        """See `Structure.matrix`."""
        if self.config.is_data_dependent:
            ids = None if packing is None else packing.sequence_id
            matrix = vandermonde_matrix(*self.queries_and_keys(factors), FREQUENCY, ids)
        else:
            matrix = table_matrix(self._table(v.shape[1]), v, packing)
        return self.scale_rows(matrix, v, packing, 2 * self.config.qk_dim)


class FourierMatrix(Structure):
    """cos(2 pi t l / length) / sqrt(length), the real part of the discrete Fourier transform of each sequence.

    parity="reference" takes the transform of max_seq_len points for every length, and keeps it, as published, as a
    buffer in the state dict.
    """

    dft_matrix: Tensor

    def __init__(self, config: Any, nheads: int, headdim: int) -> None:
        super().__init__(config, nheads, headdim)
        if config.parity == "reference":
            assert config.max_seq_len is not None
            table = _cosines(torch.arange(config.max_seq_len)[None], config.max_seq_len, torch.get_default_dtype())[0]
            self.register_buffer("dft_matrix", table)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Published state dicts hold the constant matrix; where it is not kept it is not missed."""
        if self.config.parity != "reference":
            state_dict.pop(f"{prefix}dft_matrix", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def mix(self, v: Tensor, factors: Tensor, packing: Packing | None) -> Tensor:
        """See `Structure.mix`."""
        if self.config.parity == "reference":
            return mix_by_table(self.dft_matrix.expand(self.nheads, -1, -1), v, packing) * self.row_scale(v, packing)
        matrix = self._matrix(v, packing)[:, 0].to(v.dtype)
        return torch.einsum("btl,blhp->bthp", matrix, v) * self.row_scale(v, packing)

    def _matrix(self, v: Tensor, packing: Packing | None) -> Tensor:
        """Without its scale: [batch or 1, 1, length, length]."""
        dtype = torch.promote_types(v.dtype, torch.float32)
        if packing is None:
            return _cosines(torch.arange(v.shape[1], device=v.device)[None], v.shape[1], dtype)[:, None]
        entries = _cosines(packing.positions(), packing.lengths()[..., None], dtype)[:, None]
        return torch.where(same_sequence(packing.sequence_id), entries, 0.0)

    def matrix(self, v: Tensor, factors: Tensor, packing: Packing | None) -> Tensor:
        """See `Structure.matrix`."""
        if self.config.parity == "reference":
            matrix = table_matrix(self.dft_matrix.expand(self.nheads, -1, -1), v, packing)
        else:
            matrix = self._matrix(v, packing).expand(v.shape[0], self.nheads, -1, -1)
        return self.scale_rows(matrix.to(v.dtype), v, packing)


def _cosines(places: Tensor, points: Tensor | int, dtype: torch.dtype) -> Tensor:
    """cos(2 pi t l / points) for integer places [batch, length]: [batch, length, length]. Whole turns are taken out
    in integers, because large angles lose digits."""
    turns = (places[:, :, None] * places[:, None, :]) % points
    return torch.cos(turns.to(dtype) * (2 * math.pi) / points)


@register_mixer("vandermonde")
class Vandermonde(MatrixMixerBlock):
    """Sums of cosines of places, frequencies read from the input, learned, or (is_dft) the Fourier transform's."""

    structure = VandermondeMatrix
    matrix_mixer_type = "vandermonde"

    @dataclass(kw_only=True)
    class Config(MatrixMixerBlock.Config):
        """is_dft: take the discrete Fourier transform, which has no parameters and any length; None: where
        qk_dim is -1, as published, and for every data-independent one with parity "reference", whose code runs the
        transform whatever its options say."""

        is_dft: bool | None = None

        def validate(self, d_model: int, path: str) -> None:
            if self.is_dft and self.is_data_dependent:
                raise UserError(
                    f"{path}.is_dft: the Fourier transform is data-independent; set is_data_dependent: false"
                )
            super().validate(d_model, path)

        def runs_dft(self) -> bool:
            """Whether `is_dft` comes to True."""
            if self.is_dft is None:
                return not self.is_data_dependent and (self.qk_dim == -1 or self.parity == "reference")
            return self.is_dft

        def uses_qk_dim(self) -> bool:
            return not self.runs_dft()

        def needs_max_seq_len(self) -> bool:
            return not self.is_data_dependent and (not self.runs_dft() or self.parity == "reference")

    def _structure(self) -> type[Structure]:
        return FourierMatrix if not self.config.uses_qk_dim() else self.structure
