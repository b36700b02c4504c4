"""State-space duality, the mixer of Mamba-2 (arXiv 2405.21060): one scalar decay a head and token."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from anymixer_kernels.linear_recurrence import StateSpace
from torch import Tensor, nn
from torch.nn.functional import softplus

from anymixer.errors import UserError
from anymixer.layers.norm import GatedRMSNorm
from anymixer.layers.packing import Packing
from anymixer.layers.param_hints import ParamHint
from anymixer.layers.positions import rotate
from anymixer.layers.short_conv import ShortConv
from anymixer.layers.step_sizes import draw_step_bias
from anymixer.mixers.base import State, register_mixer
from anymixer.mixers.linear_recurrent import LinearRecurrentMixer, RecurrenceInputs


@register_mixer("ssd")
class SSD(LinearRecurrentMixer):
    """Mamba-2's mixer: S_t = exp(A dt) S_{t-1} + dt B x^T, y = C S + D x, with a short convolution and a gate."""

    @dataclass(kw_only=True)
    class Config(LinearRecurrentMixer.Config):
        """Options, with Mamba-2's defaults.

        headdim: None takes the largest divisor of expand * d_model up to 64. ngroups: how many B and C the heads share.
        d_conv: width of the convolution over x, B and C; 0 leaves it out. gate: multiply by silu(z) after the norm;
        without it there is neither gate nor norm. skip: add D x. A_min, A_max: range of the initial decays. rotary:
        rotate B and C by their tokens' positions (Cheems, arXiv 2412.11834).
        """

        ALWAYS_CAUSAL: ClassVar[bool] = True

        d_state: int = 128
        d_conv: int = 4
        expand: int = 2
        headdim: int | None = None
        ngroups: int = 1
        gate: bool = True
        skip: bool = True
        A_min: float = 1.0
        A_max: float = 16.0
        dt_min: float = 0.001
        dt_max: float = 0.1
        dt_init_floor: float = 1e-4
        bias: bool = False
        conv_bias: bool = True
        rotary: bool = False
        rotary_theta: float = 10000.0

        def validate(self, d_model: int, path: str) -> None:
            for key, lowest in (("d_state", 1), ("d_conv", 0), ("expand", 1), ("ngroups", 1)):
                if getattr(self, key) < lowest:
                    raise UserError(f"{path}.{key}: {getattr(self, key)} is below {lowest}")
            d_inner, headdim = self.expand * d_model, self.resolve_headdim(d_model)
            if headdim < 1 or d_inner % headdim:
                raise UserError(f"{path}.headdim: {headdim} does not divide expand * d_model = {d_inner}")
            if (d_inner // headdim) % self.ngroups:
                raise UserError(f"{path}.ngroups: {self.ngroups} does not divide the {d_inner // headdim} heads")
            if not 0 < self.A_min <= self.A_max:
                raise UserError(f"{path}.A_min: {self.A_min} and A_max = {self.A_max} are no range of decays")
            if self.rotary and self.d_state % 2:
                raise UserError(f"{path}.d_state: rotary needs an even number, not {self.d_state}")

        def resolve_headdim(self, d_model: int) -> int:
            """The head width in use."""
            d_inner = self.expand * d_model
            if self.headdim is not None:
                return self.headdim
            return max(n for n in range(1, min(64, d_inner) + 1) if d_inner % n == 0)

    def __init__(self, d_model: int, *, layer_idx: int | None = None, **options: Any) -> None:
        """d_model: width in and out; options: the fields of `Config`."""
        super().__init__()
        config = self.Config(**options)
        config.validate(d_model, type(self).__name__)
        self.config = config
        self.d_inner = config.expand * d_model
        self.value_width = config.resolve_headdim(d_model)
        self.nheads, self.d_state = self.d_inner // self.value_width, config.d_state
        conv_width = self.d_inner + 2 * config.ngroups * config.d_state
        self._split = (self.d_inner if config.gate else 0, conv_width, self.nheads)
        self.in_proj = nn.Linear(d_model, sum(self._split), bias=config.bias)
        self.conv = ShortConv(conv_width, config.d_conv, bias=config.conv_bias) if config.d_conv else None
        self.dt_bias = nn.Parameter(torch.empty(self.nheads))
        self.A_log = nn.Parameter(torch.empty(self.nheads))
        if config.skip:
            self.D = nn.Parameter(torch.empty(self.nheads))
        if config.gate:
            self.norm = GatedRMSNorm(self.d_inner, eps=1e-5)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=config.bias)
        self.reset_own_parameters()

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        """dt log-uniform in [dt_min, dt_max], decays uniform in [A_min, A_max], D = 1, the convolution."""
        config = self.config
        if self.conv is not None:
            self.conv.reset_parameters()
        draw_step_bias(self.dt_bias, config.dt_min, config.dt_max, config.dt_init_floor)
        self.A_log.uniform_(config.A_min, config.A_max).log_()
        if config.skip:
            nn.init.ones_(self.D)

    def param_hints(self) -> dict[str, ParamHint]:
        """No weight decay on the recurrence's own parameters."""
        return {name: ParamHint(weight_decay=False) for name in ("dt_bias", "A_log", "D") if hasattr(self, name)}

    def _project(self, hidden_states: Tensor) -> tuple[Tensor, Any]:
        gate, mixed, dt = self.in_proj(hidden_states).split(self._split, dim=-1)
        return mixed, (gate, dt)

    def _inputs(self, convolved: Tensor, passed: Any) -> RecurrenceInputs:
        gate, dt = passed
        states = self.config.ngroups * self.d_state
        x, B, C = convolved.split([self.d_inner, states, states], dim=-1)
        x = x.unflatten(-1, (self.nheads, self.value_width))
        wide = torch.promote_types(dt.dtype, torch.float32)
        dt = softplus(dt.to(wide) + self.dt_bias.to(wide))
        A = -torch.exp(self.A_log.to(wide))
        return RecurrenceInputs(
            q=C.unflatten(-1, (self.config.ngroups, self.d_state)),
            k=B.unflatten(-1, (self.config.ngroups, self.d_state)),
            v=(x * dt[..., None]).to(x.dtype),
            log_decay=A * dt,
            rest=(gate, x),
            state_space=StateSpace(x, dt, A),
        )

    def _read(self, hidden_states: Tensor, packing: Packing | None) -> tuple[RecurrenceInputs, Tensor]:
        inputs, raw = super()._read(hidden_states, packing)
        if self.config.rotary:
            # Distances alone matter: with the last token at 0, the state that is left needs no position beside it.
            places = torch.arange(1 - hidden_states.shape[1], 1, device=hidden_states.device)[:, None]
            q, k = (rotate(t, places, self.config.rotary_theta) for t in (inputs.q, inputs.k))
            inputs = replace(inputs, q=q, k=k)
        return inputs, raw

    def step(self, hidden_states: Tensor, state: State) -> tuple[Tensor, State]:
        """See `SequenceMixer.step`. With rotary, the new token is at 0, and what the state holds one place further."""
        if self.config.rotary:
            by_value = state["recurrence"].transpose(-1, -2)
            before = torch.full((), -1, device=by_value.device)
            state = {**state, "recurrence": rotate(by_value, before, self.config.rotary_theta).transpose(-1, -2)}
        return super().step(hidden_states, state)

    def _finish(self, mixed: Tensor, inputs: RecurrenceInputs) -> Tensor:
        gate, x = inputs.rest
        if self.config.skip:
            mixed = mixed + self.D.to(x.dtype)[:, None] * x
        mixed = mixed.flatten(-2)
        return self.out_proj(self.norm(mixed, gate) if self.config.gate else mixed)
