"""What mixers share whose core is a recurrence with a matrix for a state (`anymixer_kernels.linear_recurrence`)."""

from dataclasses import dataclass
from typing import Any

import torch
from anymixer_kernels.elementwise_scan import elementwise_scan
from anymixer_kernels.linear_recurrence import (
    StateSpace,
    linear_recurrence,
    linear_recurrence_both_ways,
    linear_recurrence_both_ways_matrix,
    linear_recurrence_matrix,
    linear_recurrence_step,
)
from torch import Tensor

from anymixer.layers.packing import Packing
from anymixer.layers.short_conv import ShortConv
from anymixer.mixers.base import SequenceMixer, State

# Numbers of the states that a prompt's scan makes at once: 32 MiB in float32.
SCANNED = 2**23


@dataclass(frozen=True)
class RecurrenceInputs:
    """q, k, v, log_decay, state_space: as `linear_recurrence` reads them. rest: what `_finish` needs besides."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    rest: Any = None
    state_space: StateSpace | None = None


class LinearRecurrentMixer(SequenceMixer):
    """A projection of every token, perhaps a short convolution, the recurrence, and what follows it.

    A subclass sets `nheads`, `d_state` (dimensions of a key) and `value_width` (of a value), a `conv` (ShortConv or
    None), and implements `_project`, `_inputs` and `_finish`, which treat every token alone. One whose `causal` is
    false reads both ways, with the same projections; it has no convolution and no state.
    """

    causal: bool = True
    nheads: int
    d_state: int
    value_width: int
    conv: ShortConv | None

    def _project(self, hidden_states: Tensor) -> tuple[Tensor, Any]:
        """What the convolution reads, [..., channels], and what passes by it; from [..., d_model]."""
        raise NotImplementedError

    def _inputs(self, convolved: Tensor, passed: Any) -> RecurrenceInputs:
        """What the recurrence reads; tensors with whatever axes stand before the channels."""
        raise NotImplementedError

    def _finish(self, mixed: Tensor, inputs: RecurrenceInputs) -> Tensor:
        """[..., nheads, value_width] -> [..., d_model]."""
        raise NotImplementedError

    def _read(self, hidden_states: Tensor, packing: Packing | None) -> tuple[RecurrenceInputs, Tensor]:
        """What the recurrence reads of whole rows, and what the convolution read."""
        raw, passed = self._project(hidden_states)
        return self._inputs(raw if self.conv is None else self.conv(raw, packing), passed), raw

    def forward(self, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """[batch, length, d_model] -> the same shape; see `SequenceMixer.forward`."""
        inputs, _ = self._read(hidden_states, packing)
        mixed = self._recur(inputs, packing)[0] if self.causal else self._recur_both_ways(inputs, packing)
        return self._finish(mixed, inputs)

    def _recur_both_ways(self, inputs: RecurrenceInputs, packing: Packing | None) -> Tensor:
        ids = None if packing is None else packing.sequence_id
        return linear_recurrence_both_ways(inputs.q, inputs.k, inputs.v, inputs.log_decay, sequence_id=ids)

    def _recur(self, inputs: RecurrenceInputs, packing: Packing | None) -> tuple[Tensor, Tensor]:
        ids = None if packing is None else packing.sequence_id
        space = inputs.state_space
        return linear_recurrence(inputs.q, inputs.k, inputs.v, inputs.log_decay, sequence_id=ids, state_space=space)

    def matrix(self, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """M per head: [batch, nheads, length, length]."""
        inputs, _ = self._read(hidden_states, packing)
        ids = None if packing is None else packing.sequence_id
        matrix = linear_recurrence_matrix if self.causal else linear_recurrence_both_ways_matrix
        return matrix(inputs.q, inputs.k, inputs.log_decay, ids)

    def values(self, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """V per head: [batch, nheads, length, value_width]."""
        return self._read(hidden_states, packing)[0].v.transpose(1, 2)

    def output(self, mixed: Tensor, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """What follows the recurrence, of [batch, nheads, length, value_width]."""
        return self._finish(mixed.transpose(1, 2), self._read(hidden_states, packing)[0])

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The recurrence's state, in float32 or wider, and the convolution's last inputs."""
        if not self.causal:
            return super().init_state(batch, device, dtype)
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        shape = (batch, self.nheads, self.d_state, self.value_width)
        state = {"recurrence": torch.zeros(shape, device=device, dtype=wide)}
        return state if self.conv is None else state | {"conv": self.conv.init_state(batch, device, dtype)}

    def prefill(self, hidden_states: Tensor, packing: Packing | None = None) -> tuple[Tensor, State]:
        """See `SequenceMixer.prefill`; the whole prompt at once."""
        if not self.causal:
            return super().prefill(hidden_states, packing)
        inputs, raw = self._read(hidden_states, packing)
        mixed, last = self._recur(inputs, packing)
        state = {"recurrence": last}
        if self.conv is not None:
            state["conv"] = self.conv.last_inputs(raw, packing)
        return self._finish(mixed, inputs), state

    def step(self, hidden_states: Tensor, state: State) -> tuple[Tensor, State]:
        """See `SequenceMixer.step`."""
        if not self.causal:
            return super().step(hidden_states, state)
        raw, passed = self._project(hidden_states)
        after = {}
        if self.conv is not None:
            raw, after["conv"] = self.conv.step(raw, state["conv"])
        inputs = self._inputs(raw, passed)
        mixed, last = linear_recurrence_step(inputs.q, inputs.k, inputs.v, inputs.log_decay, state["recurrence"])
        return self._finish(mixed, inputs), {"recurrence": last, **after}

    def state_size(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """See `SequenceMixer.state_size`; the same for every length."""
        if not self.causal:
            return super().state_size(length, dtype)
        wide = torch.promote_types(dtype, torch.float32).itemsize
        convolution = 0 if self.conv is None else self.conv.state_size(dtype)
        return self.nheads * self.d_state * self.value_width * wide + convolution


class ElementwiseMixer(LinearRecurrentMixer):
    """One whose every channel is a head of its own with values of width 1, which a scan computes more cheaply than
    chunks of a matrix do."""

    value_width = 1

    def _recur(self, inputs: RecurrenceInputs, packing: Packing | None) -> tuple[Tensor, Tensor]:
        return self._scan(inputs, sequence_id=None if packing is None else packing.sequence_id)

    def _scan(self, inputs: RecurrenceInputs, real: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        """real: [batch, length]; a token that is not passes the state on."""
        decay = torch.exp(inputs.log_decay)
        gain = (inputs.k * inputs.v).to(decay.dtype)
        if real is not None:
            decay, gain = (torch.where(real[..., None, None], t, idle) for t, idle in ((decay, 1.0), (gain, 0.0)))
        states = elementwise_scan(decay, gain, **options)
        mixed = (inputs.q * states).sum(-1, keepdim=True).to(inputs.v.dtype)
        # A copy: a view would keep the states of the whole row.
        return mixed, states[:, -1, :, :, None].clone()

    def prefill(self, hidden_states: Tensor, packing: Packing | None = None) -> tuple[Tensor, State]:
        """See `SequenceMixer.prefill`; a piece of the prompt at a time, because the scan makes the states of all of a
        piece's tokens."""
        raw, passed = self._project(hidden_states)
        after = {} if self.conv is None else {"conv": self.conv.last_inputs(raw, packing)}
        convolved = raw if self.conv is None else self.conv(raw, packing)
        last = self.init_state(len(raw), raw.device, raw.dtype)["recurrence"]
        size = max(1, SCANNED // last.numel())
        outputs = []
        for start in range(0, raw.shape[1], size):
            piece = slice(start, start + size)
            inputs = self._inputs(convolved[:, piece], None if passed is None else passed[:, piece])
            real = None if packing is None else packing.real[:, piece]
            mixed, last = self._scan(inputs, real, initial_state=last[..., 0])
            outputs.append(self._finish(mixed, inputs))
        return torch.cat(outputs, dim=1), {"recurrence": last, **after}
