"""Long convolutions whose kernels are parameters: no state space, one number a channel and lag."""

from dataclasses import dataclass
from typing import Any

import torch
from anymixer_kernels.blockwise import wide
from torch import Tensor, nn
from torch.nn.functional import pad

from anymixer.errors import UserError
from anymixer.layers.packing import Packing
from anymixer.mixers.base import State, register_mixer
from anymixer.mixers.lti import LTIMixer


@register_mixer("longconv")
class LongConv(LTIMixer):
    """K_l free for l below l_max, and 0 from there on. Its causal form keeps the last l_max - 1 inputs for a state."""

    @dataclass(kw_only=True)
    class Config(LTIMixer.Config):
        """l_max: lags of a kernel; rows may be longer."""

        l_max: int = 1024

        def validate(self, d_model: int, path: str) -> None:
            super().validate(d_model, path)
            if self.l_max < 1:
                raise UserError(f"{path}.l_max: {self.l_max} is below 1")

    config: Config

    def __init__(self, d_model: int, *, layer_idx: int | None = None, **options: Any) -> None:
        """d_model: width in and out; options: the fields of `Config`."""
        super().__init__()
        config = self.Config(**options)
        self._make_layers(d_model, config)
        self.kernel = nn.Parameter(torch.empty(1 if config.causal else 2, self.channels, config.l_max))
        self.reset_own_parameters()

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        """Normal kernels of variance 1 / (channels l_max), D normal."""
        self.kernel.normal_(std=(self.channels * self.config.l_max) ** -0.5)
        self.D.normal_()

    def lags(self, length: int) -> tuple[Tensor, Tensor | None]:
        """See `LTIMixer.lags`."""
        found = pad(wide(self.kernel)[..., :length], (0, max(0, length - self.config.l_max)))
        return found[0], None if self.config.causal else found[1]

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The inputs before the first token: zeros."""
        if not self.config.causal:
            return super().init_state(batch, device, dtype)
        return {"inputs": torch.zeros(batch, self.config.l_max - 1, self.channels, device=device, dtype=dtype)}

    def step(self, hidden_states: Tensor, state: State) -> tuple[Tensor, State]:
        """See `SequenceMixer.step`."""
        if not self.config.causal:
            return super().step(hidden_states, state)
        u = self._read(hidden_states)
        inputs = torch.cat([state["inputs"].to(u.dtype), u[:, None]], dim=1)
        mixed = torch.einsum("blh,hl->bh", wide(inputs), wide(self.kernel[0]).flip(-1)).to(u.dtype)
        return self._finish(mixed, u, hidden_states), {"inputs": inputs[:, 1:]}

    def prefill(self, hidden_states: Tensor, packing: Packing | None = None) -> tuple[Tensor, State]:
        """See `SequenceMixer.prefill`; the whole prompt at once."""
        if not self.config.causal:
            return super().prefill(hidden_states, packing)
        u = self._inputs(hidden_states, packing)
        before = self.init_state(u.shape[0], u.device, u.dtype)["inputs"]
        # A copy: a view would keep the whole row.
        inputs = torch.cat([before, u], dim=1)[:, u.shape[1] :].clone()
        return self._finish(self._convolve(u, None), u, hidden_states), {"inputs": inputs}

    def state_size(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """See `SequenceMixer.state_size`; the same for every length."""
        if not self.config.causal:
            return super().state_size(length, dtype)
        return (self.config.l_max - 1) * self.channels * dtype.itemsize
