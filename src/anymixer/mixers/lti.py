"""What mixers share that convolve every channel with a kernel of its own (`anymixer_kernels.lti`)."""

from dataclasses import dataclass
from typing import Literal

import torch
from anymixer_kernels.lti import (
    DenseSystem,
    DiagonalSystem,
    StateSpace,
    lti_matrix,
    lti_mix,
    state_space_mix,
    state_space_scan,
)
from torch import Tensor, nn
from torch.nn.functional import gelu, glu, silu

from anymixer.errors import UserError
from anymixer.layers.packing import Packing
from anymixer.mixers.base import SequenceMixer, State

__all__ = ["ACTIVATIONS", "DenseSystem", "DiagonalSystem", "LTIMixer", "StateSpaceMixer"]

ACTIVATIONS = {"gelu": gelu, "silu": silu, "none": lambda x: x}


class LTIMixer(SequenceMixer):
    """Channels u of the tokens, perhaps fewer than d_model; their convolution plus D u; and what joins channels.

    A subclass calls `_make_layers` in its constructor and implements `lags`.
    """

    @dataclass(kw_only=True)
    class Config(SequenceMixer.Config):
        """Options of all convolutions.

        causal: no token sees a later one; otherwise a second kernel, of the later tokens, starts with the neighbour,
        so that the diagonal counts once. activation: after the convolution, before channels are joined. output: how
        these are: glu, one linear map and a gate from the same channels (S4); linear; gate, a multiplicative one from
        the tokens themselves, gate_expand * d_model wide (GSS, arXiv 2206.13947; BiGS, arXiv 2212.10544).
        bottleneck: convolve d_model / bottleneck channels that a linear map takes from the tokens; 1 convolves the
        tokens as they are.
        """

        causal: bool = False
        activation: Literal["gelu", "silu", "none"] = "gelu"
        output: Literal["glu", "linear", "gate"] = "glu"
        gate_expand: int = 1
        bottleneck: int = 1

        def validate(self, d_model: int, path: str) -> None:
            if self.gate_expand < 1:
                raise UserError(f"{path}.gate_expand: {self.gate_expand} is below 1")
            if self.bottleneck < 1 or d_model % self.bottleneck:
                raise UserError(f"{path}.bottleneck: {self.bottleneck} does not divide d_model = {d_model}")

    config: Config
    channels: int

    def _make_layers(self, d_model: int, config: Config) -> None:
        """The linear maps and D; sets `config` and `channels`."""
        config.validate(d_model, type(self).__name__)
        self.config = config
        self.channels = d_model // config.bottleneck
        self.in_proj = nn.Linear(d_model, self.channels) if config.bottleneck > 1 else None
        self.D = nn.Parameter(torch.empty(self.channels))
        if config.output == "gate":
            wide = config.gate_expand * d_model
            self.gate_proj = nn.Linear(d_model, wide)
            self.up_proj = nn.Linear(self.channels, wide)
            self.out_proj = nn.Linear(wide, d_model)
        else:
            self.out_proj = nn.Linear(self.channels, d_model * (2 if config.output == "glu" else 1))

    def lags(self, length: int) -> tuple[Tensor, Tensor | None]:
        """The kernels, [channels, length], of earlier tokens from lag 0 and of later ones from lag 1 (None: causal)."""
        raise NotImplementedError

    def _read(self, hidden_states: Tensor) -> Tensor:
        """What is convolved: [..., d_model] -> [..., channels]."""
        if self.in_proj is None:
            return hidden_states
        return ACTIVATIONS[self.config.activation](self.in_proj(hidden_states))

    def _inputs(self, hidden_states: Tensor, packing: Packing | None) -> Tensor:
        """`_read`, and 0 at padding."""
        read = self._read(hidden_states)
        return read if packing is None else torch.where(packing.real[..., None], read, 0.0)

    def _convolve(self, u: Tensor, sequence_id: Tensor | None) -> Tensor:
        below, above = self.lags(u.shape[1])
        return lti_mix(below, u, above, sequence_id)

    def _finish(self, mixed: Tensor, u: Tensor, hidden_states: Tensor) -> Tensor:
        """From the convolution of u, [..., channels], to [..., d_model]."""
        activate = ACTIVATIONS[self.config.activation]
        y = mixed + self.D.to(u.dtype) * u
        if self.config.output == "gate":
            return self.out_proj(self.up_proj(y) * activate(self.gate_proj(hidden_states)))
        joined = self.out_proj(activate(y))
        return glu(joined, dim=-1) if self.config.output == "glu" else joined

    def forward(self, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """[batch, length, d_model] -> the same shape; see `SequenceMixer.forward`."""
        u = self._inputs(hidden_states, packing)
        # One sequence a row needs no identities: it is the same convolution wherever it stands among zeros.
        ids = packing.sequence_id if packing is not None and packing.packed else None
        return self._finish(self._convolve(u, ids), u, hidden_states)

    def matrix(self, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """M per channel: [batch, channels, length, length]."""
        ids = None if packing is None else packing.sequence_id
        return lti_matrix(*self.lags(hidden_states.shape[1]), hidden_states.shape[0], ids)

    def values(self, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """V per channel: [batch, channels, length, 1]."""
        return self._inputs(hidden_states, packing).transpose(1, 2)[..., None]

    def output(self, mixed: Tensor, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """What follows the convolution, of [batch, channels, length, 1]."""
        return self._finish(mixed[..., 0].transpose(1, 2), self._inputs(hidden_states, packing), hidden_states)


class StateSpaceMixer(LTIMixer):
    """One whose kernels are those of state spaces; a subclass implements `systems` and, cheaply, `state_width`.

    Its causal form runs token by token in constant memory, and reads a prompt in chunks.
    """

    state_width: int

    def systems(self) -> tuple[StateSpace, StateSpace | None]:
        """The systems of earlier and of later tokens (None: causal)."""
        raise NotImplementedError

    def lags(self, length: int) -> tuple[Tensor, Tensor | None]:
        """See `LTIMixer.lags`."""
        with torch.autocast(self.D.device.type, enabled=False):
            system, later = self.systems()
            return system.kernel(length), None if later is None else later.kernel(length)

    def _convolve(self, u: Tensor, sequence_id: Tensor | None) -> Tensor:
        with torch.autocast(u.device.type, enabled=False):
            system, later = self.systems()
            return state_space_mix(system, u, later, sequence_id)

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Every channel's state, in float32 or wider."""
        if not self.config.causal:
            return super().init_state(batch, device, dtype)
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        return {"system": torch.zeros(batch, self.channels, self.state_width, device=device, dtype=wide)}

    def step(self, hidden_states: Tensor, state: State) -> tuple[Tensor, State]:
        """See `SequenceMixer.step`."""
        if not self.config.causal:
            return super().step(hidden_states, state)
        u = self._read(hidden_states)
        with torch.autocast(u.device.type, enabled=False):
            mixed, last = self.systems()[0].step(u, state["system"])
        return self._finish(mixed, u, hidden_states), {"system": last}

    def prefill(self, hidden_states: Tensor, packing: Packing | None = None) -> tuple[Tensor, State]:
        """See `SequenceMixer.prefill`; the whole prompt at once."""
        if not self.config.causal:
            return super().prefill(hidden_states, packing)
        u = self._inputs(hidden_states, packing)
        with torch.autocast(u.device.type, enabled=False):
            mixed, last = state_space_scan(self.systems()[0], u)
        return self._finish(mixed, u, hidden_states), {"system": last}

    def state_size(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """See `SequenceMixer.state_size`; the same for every length."""
        if not self.config.causal:
            return super().state_size(length, dtype)
        return self.channels * self.state_width * torch.promote_types(dtype, torch.float32).itemsize
