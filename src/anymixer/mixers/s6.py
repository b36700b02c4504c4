"""The selective scan, the mixer of Mamba (arXiv 2312.00752): a diagonal state-space model whose step, input and readout
depend on the token."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from anymixer.errors import UserError
from anymixer.layers.param_hints import ParamHint
from anymixer.layers.short_conv import ShortConv
from anymixer.layers.step_sizes import draw_step_bias
from anymixer.mixers.base import register_mixer
from anymixer.mixers.linear_recurrent import ElementwiseMixer, RecurrenceInputs


@register_mixer("s6")
class S6(ElementwiseMixer):
    """Mamba's mixer: h_t = exp(dt A) h_{t-1} + dt B x per channel, y = C h + D x; short convolution and gate."""

    @dataclass(kw_only=True)
    class Config(ElementwiseMixer.Config):
        """Options, with Mamba's defaults; expand: 1, d_conv: 0 and gate: false are the bare scan.

        dt_rank: of the projection to the step sizes; None is d_model / 16. d_conv: width of the convolution; 0 leaves
        it out. gate: multiply by silu(z).
        """

        ALWAYS_CAUSAL: ClassVar[bool] = True

        d_state: int = 16
        d_conv: int = 4
        expand: int = 2
        dt_rank: int | None = None
        gate: bool = True
        dt_min: float = 0.001
        dt_max: float = 0.1
        dt_init_floor: float = 1e-4
        bias: bool = False
        conv_bias: bool = True

        def validate(self, d_model: int, path: str) -> None:
            lowest = {"d_state": 1, "d_conv": 0, "expand": 1, "dt_rank": 1}
            for key, least in lowest.items():
                if (value := getattr(self, key)) is not None and value < least:
                    raise UserError(f"{path}.{key}: {value} is below {least}")

    def __init__(self, d_model: int, *, layer_idx: int | None = None, **options: Any) -> None:
        """d_model: width in and out; options: the fields of `Config`."""
        super().__init__()
        config = self.Config(**options)
        config.validate(d_model, type(self).__name__)
        self.config = config
        self.d_inner = self.nheads = config.expand * d_model
        self.d_state = config.d_state
        self.dt_rank = config.dt_rank or math.ceil(d_model / 16)
        self.in_proj = nn.Linear(d_model, self.d_inner * (2 if config.gate else 1), bias=config.bias)
        self.conv = ShortConv(self.d_inner, config.d_conv, bias=config.conv_bias) if config.d_conv else None
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * config.d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(self.d_inner))
        self.A_log = nn.Parameter(torch.empty(self.d_inner, config.d_state))
        self.D = nn.Parameter(torch.empty(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=config.bias)
        self.reset_own_parameters()

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        """A = -1 .. -d_state, dt log-uniform in [dt_min, dt_max], D = 1, the convolution, and dt_proj, whose scale
        decides how far a token can move its step."""
        if self.conv is not None:
            self.conv.reset_parameters()
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        draw_step_bias(self.dt_bias, self.config.dt_min, self.config.dt_max, self.config.dt_init_floor)
        rates = torch.arange(1, self.d_state + 1, device=self.A_log.device, dtype=self.A_log.dtype)
        self.A_log.copy_(rates.log().expand_as(self.A_log))
        nn.init.ones_(self.D)

    def param_hints(self) -> dict[str, ParamHint]:
        """No weight decay on the recurrence's own parameters."""
        return {name: ParamHint(weight_decay=False) for name in ("dt_bias", "A_log", "D")}

    def _project(self, hidden_states: Tensor) -> tuple[Tensor, Any]:
        x, gate = self.in_proj(hidden_states).tensor_split([self.d_inner], dim=-1)
        return x, gate

    def _inputs(self, convolved: Tensor, passed: Any) -> RecurrenceInputs:
        dt, B, C = self.x_proj(convolved).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        wide = torch.promote_types(dt.dtype, torch.float32)
        dt = softplus(self.dt_proj(dt).to(wide) + self.dt_bias.to(wide))
        return RecurrenceInputs(
            q=C.to(wide)[..., None, :],
            k=B.to(wide)[..., None, :],
            v=(dt * convolved)[..., None],
            log_decay=-torch.exp(self.A_log.to(wide)) * dt[..., None],
            rest=(passed, convolved),
        )

    def _finish(self, mixed: Tensor, inputs: RecurrenceInputs) -> Tensor:
        gate, x = inputs.rest
        y = mixed[..., 0].to(x.dtype) + self.D.to(x.dtype) * x
        return self.out_proj(y * silu(gate) if self.config.gate else y)
