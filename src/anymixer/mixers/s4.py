"""S4 (arXiv 2111.00396): a state space for every channel whose matrix is HiPPO's, diagonal plus low-rank."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from anymixer_kernels.blockwise import wide
from anymixer_kernels.lti import LowRankSystem
from torch import Tensor, nn

from anymixer.layers.hippo import diagonal_plus_low_rank
from anymixer.mixers.base import register_mixer
from anymixer.mixers.s4d import B_CLIP, ContinuousSSM

# Of FouT, whose eigenvalues have no real part; its logarithm is the parameter. With less, float32 Cauchy sums lose
# digits at the eigenvalue 0, a pole of theirs.
LEAST_DECAY = 1e-3


@register_mixer("s4")
class S4(ContinuousSSM):
    """x' = (Lambda - P P^*) x + B u, y = C x by the bilinear rule; causal, or with a second C for the later tokens."""

    @dataclass(kw_only=True)
    class Config(ContinuousSSM.Config):
        """init: the HiPPO matrix: legs, lagt and fout of rank 1, legt of rank 2. kernel: by powers of A_bar, or by
        S4's Cauchy sums; the same numbers, the powers faster (5 times for 1,024 tokens on a CPU), the sums with a digit
        more in float32 for rows of 16,384. step: one token in time linear in d_state, or with the whole A_bar."""

        init: Literal["legs", "legt", "lagt", "fout"] = "legs"
        kernel: Literal["powers", "cauchy"] = "powers"
        step: Literal["linear", "dense"] = "linear"

    config: Config

    def __init__(self, d_model: int, *, layer_idx: int | None = None, **options: Any) -> None:
        """d_model: width in and out; options: the fields of `Config`."""
        super().__init__()
        config = self.Config(**options)
        self._make_layers(d_model, config)
        self.state_width = config.d_state
        copies, pairs = config.n_ssm or self.channels, config.d_state // 2
        self.log_dt = self._make_dynamics(self.channels)
        self.log_A_real = self._make_dynamics(copies, pairs)
        self.A_imag = self._make_dynamics(copies, pairs)
        self.B = self._make_dynamics(copies, pairs, 2)
        self.P = self._make_dynamics(copies, 2 if config.init == "legt" else 1, pairs, 2)
        self.C = nn.Parameter(torch.empty(1 if config.causal else 2, self.channels, pairs, 2))
        self.reset_own_parameters()

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        """dt log-uniform, A, B (its entries at most `B_CLIP`) and P HiPPO's, |C|^2 = 1 on average, D normal."""
        config = self.config
        self.log_dt.uniform_(math.log(config.dt_min), math.log(config.dt_max))
        self.C.normal_(std=math.sqrt(0.5))
        self.D.normal_()
        form = diagonal_plus_low_rank(config.init, config.d_state)
        drive = torch.complex(form.B.real.clamp(max=B_CLIP), torch.zeros_like(form.B.real))
        values = {
            self.log_A_real: torch.log((-form.eigenvalues.real).clamp(min=LEAST_DECAY)),
            self.A_imag: form.eigenvalues.imag,
            self.B: torch.view_as_real(drive),
            self.P: torch.view_as_real(form.P.resolve_conj()),
        }
        for parameter, value in values.items():
            parameter.copy_(value.to(parameter.dtype).expand(parameter.shape))

    def systems(self) -> tuple[LowRankSystem, LowRankSystem | None]:
        """See `StateSpaceMixer.systems`."""
        dt = self._steps()
        re, im = -dt * torch.exp(self._of_channels(self.log_A_real)), dt * self._of_channels(self.A_imag)
        P = dt.sqrt()[..., None] * _as_rows(self._of_channels(self.P))
        B = dt * _as_rows(self._of_channels(self.B))
        options = {"cauchy": self.config.kernel == "cauchy", "dense_step": self.config.step == "dense"}
        # 2 Re(C x), of every pair of conjugates one
        conjugates = [torch.stack([C[..., 0], -C[..., 1]], dim=-1) for C in self._readouts()]
        found = [LowRankSystem(re, im, P, B, 2 * _as_rows(C), **options) for C in conjugates]
        return found[0], found[1] if len(found) > 1 else None


def _as_rows(parts: Tensor) -> Tensor:
    """[..., pairs, 2] -> [..., 2 pairs]: real parts, then imaginary ones."""
    return wide(parts).movedim(-1, -2).flatten(-2)
