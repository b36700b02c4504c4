"""LSSL, the linear state-space layer (arXiv 2110.13985): any matrix A, written out. Slow, and what faster forms are
held against."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from anymixer_kernels.lti import exact
from torch import nn

from anymixer.layers.hippo import hippo
from anymixer.mixers.base import register_mixer
from anymixer.mixers.lti import DenseSystem
from anymixer.mixers.s4d import ContinuousSSM


@register_mixer("lssl")
class LSSL(ContinuousSSM):
    """x' = A x + B u, y = C x by the bilinear rule, A a HiPPO matrix that is trained entry by entry."""

    @dataclass(kw_only=True)
    class Config(ContinuousSSM.Config):
        """init: the HiPPO matrix. n_ssm: one A and B for all channels, unlike S4; memory grows with n_ssm d_state^2,
        time with channels d_state^3."""

        init: Literal["legs", "legt", "lagt", "fout"] = "legs"
        n_ssm: int | None = 1

    config: Config
    dynamics = ("log_dt", "A", "B")

    def __init__(self, d_model: int, *, layer_idx: int | None = None, **options: Any) -> None:
        """d_model: width in and out; options: the fields of `Config`."""
        super().__init__()
        config = self.Config(**options)
        self._make_layers(d_model, config)
        self.state_width = size = config.d_state
        copies = config.n_ssm or self.channels
        self.log_dt = self._make_dynamics(self.channels)
        self.A = self._make_dynamics(copies, size, size)
        self.B = self._make_dynamics(copies, size)
        self.C = nn.Parameter(torch.empty(1 if config.causal else 2, self.channels, size))
        self.reset_own_parameters()

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        """dt log-uniform, A and B HiPPO's, C and D normal."""
        config = self.config
        self.log_dt.uniform_(math.log(config.dt_min), math.log(config.dt_max))
        for parameter, value in zip((self.A, self.B), hippo(config.init, config.d_state)):
            parameter.copy_(value.to(parameter.dtype).expand_as(parameter))
        self.C.normal_()
        self.D.normal_()

    def systems(self) -> tuple[DenseSystem, DenseSystem | None]:
        """See `StateSpaceMixer.systems`."""
        A, B, dt = self._of_channels(self.A), self._of_channels(self.B), self._steps()
        half = dt[..., None] / 2 * A
        one = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        driven = torch.cat([one + half, (dt * B)[..., None]], dim=-1)
        solved = torch.linalg.solve(exact(one - half), exact(driven)).to(A.dtype)
        found = [DenseSystem(solved[..., :-1], solved[..., -1], C) for C in self._readouts()]
        return found[0], found[1] if len(found) > 1 else None
