"""Quasiseparable mixing inside the matrix-mixer block: Hydra's matrix with B and C shared by both directions and by all
heads."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from anymixer_kernels.quasiseparable import QuasiseparableInputs, quasiseparable, quasiseparable_matrix
from torch import Tensor, nn
from torch.nn.functional import softplus

from anymixer.errors import UserError
from anymixer.layers.packing import Packing
from anymixer.layers.param_hints import ParamHint
from anymixer.layers.step_sizes import draw_step_bias
from anymixer.mixers.base import register_mixer
from anymixer.mixers.matrix_mixer import MatrixMixerBlock, Structure

# With balanced init: the root mean square of C . B, and the diagonal, which together with the decaying window of
# steps make ||MV|| about 0.6 of ||V||.
SIMILARITY = 2.0
DIAGONAL = 0.5


class QuasiseparableMatrix(Structure):
    """Hydra's matrix with one state of nheads * qk_dim dimensions for all heads."""

    residual = False
    activates = True

    def __init__(self, config: Any, nheads: int, headdim: int) -> None:
        super().__init__(config, nheads, headdim)
        self.d_state = nheads * config.qk_dim
        if config.is_data_dependent:
            self.plain_channels = 2 * nheads
        else:
            assert config.max_seq_len is not None
            self.BC = nn.Parameter(torch.empty(config.max_seq_len, 2 * self.d_state))
        self.dt_bias = nn.Parameter(torch.empty(nheads))
        self.A_log = nn.Parameter(torch.empty(nheads))
        self.D = nn.Parameter(torch.empty(nheads))
        self.fc_D = nn.Linear(nheads * headdim, nheads, bias=False)

    def reset(self) -> None:
        """Steps and decays as Hydra's; balanced: D = 0.5 and B, C such that C . B is of size 2."""
        config, balanced = self.config, self.config.balanced()
        draw_step_bias(self.dt_bias, config.dt_min, config.dt_max, config.dt_init_floor)
        nn.init.zeros_(self.A_log)
        nn.init.constant_(self.D, DIAGONAL if balanced else 1.0)
        if config.is_data_dependent:
            return
        if balanced:
            nn.init.normal_(self.BC, std=math.sqrt(SIMILARITY / math.sqrt(self.d_state)))
        else:
            nn.init.xavier_normal_(self.BC)

    def factor_std(self) -> float:
        """Such that E[(C . B)^2] = SIMILARITY^2 after SiLU, of which a small x has mean x^2/4 and square x^2/4."""
        part = (math.sqrt(1 + 4 * SIMILARITY**2) - 1) / 2
        return (16 * part / self.d_state) ** 0.25

    def param_hints(self) -> dict[str, ParamHint]:
        """As for Hydra: no weight decay on the recurrence's own parameters."""
        return {name: ParamHint(weight_decay=False) for name in ("dt_bias", "A_log", "D")}

    def _inputs(self, v: Tensor, factors: Tensor, packing: Packing | None) -> QuasiseparableInputs:
        batch, length = v.shape[:2]
        wide = torch.promote_types(v.dtype, torch.float32)
        if self.config.is_data_dependent:
            BC, dt = factors.split([2 * self.d_state, 2 * self.nheads], dim=-1)
            steps = softplus(dt.to(wide).unflatten(-1, (2, self.nheads)) + self.dt_bias.to(wide))
        else:
            BC = self.BC[:length].expand(batch, -1, -1) if packing is None else self.BC[packing.positions()]
            steps = softplus(self.dt_bias.to(wide)).expand(batch, length, 2, self.nheads)
        B, C = BC.to(v.dtype)[:, :, None].chunk(2, dim=-1)
        forward_dt, backward_dt = steps.unbind(dim=-2)
        return QuasiseparableInputs(
            x=v,
            dt=(forward_dt, backward_dt),
            A=-torch.exp(self.A_log.to(wide)),
            B=(B, B),
            C=(C, C),
            diagonal=self.fc_D(v.flatten(-2)) + self.D.to(v.dtype),
            sequence_id=None if packing is None else packing.sequence_id,
        )

    def mix(self, v: Tensor, factors: Tensor, packing: Packing | None) -> Tensor:
        """See `Structure.mix`."""
        return quasiseparable(self._inputs(v, factors, packing), chunk_size=self.config.chunk_size)

    def matrix(self, v: Tensor, factors: Tensor, packing: Packing | None) -> Tensor:
        """See `Structure.matrix`."""
        return quasiseparable_matrix(self._inputs(v, factors, packing))


@register_mixer("quasiseparable")
class Quasiseparable(MatrixMixerBlock):
    """Hydra's matrix as one of the family: B and C shared by directions and heads, a free diagonal, no residual."""

    structure = QuasiseparableMatrix
    matrix_mixer_type = "quasiseparable"

    @dataclass(kw_only=True)
    class Config(MatrixMixerBlock.Config):
        """dt_min, dt_max, dt_init_floor: range of the initial step sizes, and their floor. chunk_size: most tokens per
        chunk of the linear-time form."""

        dt_min: float = 0.001
        dt_max: float = 0.1
        dt_init_floor: float = 1e-4
        chunk_size: int = 256

        def validate(self, d_model: int, path: str) -> None:
            if self.chunk_size < 1:
                raise UserError(f"{path}.chunk_size: {self.chunk_size} is not positive")
            super().validate(d_model, path)
