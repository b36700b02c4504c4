"""Toeplitz mixing: an entry depends on the distance of its tokens alone."""

from dataclasses import dataclass
from typing import Any

import torch
from anymixer_kernels.backend import takes_triton
from anymixer_kernels.row_scale import finish_rows
from anymixer_kernels.toeplitz import TILES_LENGTH, toeplitz_matrix, toeplitz_mix
from torch import Tensor, nn

from anymixer.layers.packing import Packing
from anymixer.layers.static_mixing import aligned, unaligned
from anymixer.mixers.base import register_mixer
from anymixer.mixers.matrix_mixer import MatrixMixerBlock, Structure


class ToeplitzMatrix(Structure):
    """0.5 / sqrt(length) w[t - l], with w a parameter of 2 max_seq_len - 1 lags or read from the input."""

    activates = True

    def __init__(self, config: Any, nheads: int, headdim: int) -> None:
        super().__init__(config, nheads, headdim)
        self.conv_channels = 2 * nheads if config.is_data_dependent else 0
        if not config.is_data_dependent:
            assert config.max_seq_len is not None
            self.w = nn.Parameter(torch.empty(nheads, 2 * config.max_seq_len - 1))

    def reset(self) -> None:
        """Standard normal lags, which make ||MV|| half of ||V||; or Xavier's, as published."""
        if self.config.is_data_dependent:
            return
        if self.config.balanced():
            nn.init.normal_(self.w)
        else:
            nn.init.xavier_uniform_(self.w)

    def _lags(self, factors: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor]:
        """(below, above) as `toeplitz_mix` reads them. packing: None for rows of
        one sequence that begins at position 0."""
        if self.config.is_data_dependent:
            below, above = factors.unflatten(-1, (2, self.nheads)).unbind(-2)
            return self._one_lag_off(below, above, packing) if self.config.parity == "reference" else (below, above)
        zero = self.w.shape[1] // 2  # where the lag 0 is
        below, above = self.w[:, zero:].T, self.w[:, : zero + 1].flip(-1).T
        if self.config.parity == "reference":
            below, above = (lags[0] for lags in self._one_lag_off(below[None], above[None], None))
        length = factors.shape[1]
        return below[:length], above[:length]

    def _one_lag_off(self, below: Tensor, above: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor]:
        """What the published code reads: for the lag o that of o + 1, counted through 0 from above to below, where the
        one past the end is 0, or, in a sequence of max_seq_len, comes from the other end."""
        batch, length, _ = below.shape
        wraps = length == self.config.max_seq_len
        late = torch.cat([below[:, 1:], above[:, -1:] if wraps else torch.zeros_like(above[:, -1:])], dim=1)
        index = torch.arange(length, device=below.device).expand(batch, length)
        place = index if packing is None else packing.positions()
        if packing is not None:
            ids = packing.sequence_id
            next_id = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
            whole = (packing.lengths() == length) & packing.real
            late = torch.where(((next_id == ids) & ((index < length - 1) | whole))[..., None], late, 0.0)
        before = [torch.cat([lags[:, :1], lags[:, :-1]], dim=1) for lags in (below, above)]
        return late, torch.where((place == 1)[..., None], before[0], before[1])

    def mix(self, v: Tensor, factors: Tensor, packing: Packing | None) -> Tensor:
        """See `Structure.mix`."""
        return self._mix(v, factors, packing, residual=False)

    def mix_and_add(self, v: Tensor, factors: Tensor, packing: Packing | None) -> Tensor:
        """See `Structure.mix_and_add`."""
        return self._mix(v, factors, packing, residual=True)

    def _mix(self, v: Tensor, factors: Tensor, packing: Packing | None, residual: bool) -> Tensor:
        scale = 0.5 * self.scale_of_rows(v, packing)
        by_tiles = v.shape[1] <= TILES_LENGTH and takes_triton(v, "Toeplitz mixing")
        if packing is None or packing.packed or by_tiles:
            ids = None if packing is None else packing.sequence_id
            return toeplitz_mix(*self._lags(factors, packing), v, ids, scale=scale, residual=residual)
        # One sequence a row: moved to its start, it needs no mask, because v is zero after it.
        factors = aligned(torch.where(packing.real[..., None], factors, 0.0), packing)
        mixed = unaligned(toeplitz_mix(*self._lags(factors, None), aligned(v, packing)), packing)
        return finish_rows(mixed, v, scale, residual)

    def matrix(self, v: Tensor, factors: Tensor, packing: Packing | None) -> Tensor:
        """See `Structure.matrix`."""
        ids = None if packing is None else packing.sequence_id
        matrix = toeplitz_matrix(*self._lags(factors, packing), v.shape[0], ids)
        return 0.5 * self.scale_rows(matrix, v, packing)


@register_mixer("toeplitz")
class Toeplitz(MatrixMixerBlock):
    """A Toeplitz matrix for every head: its lags are parameters, or read from the tokens they point at."""

    structure = ToeplitzMatrix
    matrix_mixer_type = "toeplitz"

    @dataclass(kw_only=True)
    class Config(MatrixMixerBlock.Config):
        """qk_dim: accepted, because published calls pass it; not read."""

        qk_dim: int = -1

        def uses_qk_dim(self) -> bool:
            return False
