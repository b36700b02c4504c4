"""Mega's damped exponential moving averages (arXiv 2209.10655): state spaces with real decays below 1."""

from dataclasses import dataclass
from typing import Any

import torch
from anymixer_kernels.blockwise import wide
from torch import nn

from anymixer.errors import UserError
from anymixer.layers.param_hints import ParamHint
from anymixer.mixers.base import register_mixer
from anymixer.mixers.lti import DiagonalSystem, LTIMixer, StateSpaceMixer


@register_mixer("ema")
class EMA(StateSpaceMixer):
    """K_l = sum_n p_n beta_n gamma_n q_n^l / sqrt(d_state), p = sigmoid(delta), q = 1 - p sigmoid(alpha); each
    direction has averages of its own."""

    @dataclass(kw_only=True)
    class Config(LTIMixer.Config):
        """d_state: averages a channel and direction. activation, output: as in S4; Mega follows with attention."""

        d_state: int = 2

        def validate(self, d_model: int, path: str) -> None:
            super().validate(d_model, path)
            if self.d_state < 1:
                raise UserError(f"{path}.d_state: {self.d_state} is below 1")

    config: Config

    def __init__(self, d_model: int, *, layer_idx: int | None = None, **options: Any) -> None:
        """d_model: width in and out; options: the fields of `Config`."""
        super().__init__()
        config = self.Config(**options)
        self._make_layers(d_model, config)
        self.state_width = config.d_state
        shape = (1 if config.causal else 2, self.channels, config.d_state)
        self.delta, self.alpha, self.beta, self.gamma = (nn.Parameter(torch.empty(shape)) for _ in range(4))
        self.reset_own_parameters()

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        """delta and alpha near 0, beta about 1 and -1 by turns, gamma and D normal."""
        self.delta.normal_(std=0.2)
        self.alpha.normal_(std=0.2)
        self.beta.normal_(std=0.02)
        self.beta[..., ::2] += 1
        self.beta[..., 1::2] -= 1
        self.gamma.normal_()
        self.D.normal_()

    def param_hints(self) -> dict[str, ParamHint]:
        """No weight decay on the averages."""
        return dict.fromkeys(("delta", "alpha", "beta", "gamma"), ParamHint(weight_decay=False))

    def systems(self) -> tuple[DiagonalSystem, DiagonalSystem | None]:
        """See `StateSpaceMixer.systems`."""
        gain = torch.sigmoid(wide(self.delta))
        log_decay = torch.log1p(-gain * torch.sigmoid(wide(self.alpha)))
        weight = gain * wide(self.beta) * wide(self.gamma) / self.config.d_state**0.5
        found = [DiagonalSystem(decay, read) for decay, read in zip(log_decay, weight)]
        return found[0], found[1] if len(found) > 1 else None
