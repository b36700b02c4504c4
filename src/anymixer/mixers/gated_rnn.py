"""Gated linear recurrent networks with one number of state a channel: HGRN (arXiv 2311.04823), qLSTM (2405.15731)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, logsigmoid, relu, silu

from anymixer.errors import UserError
from anymixer.layers.short_conv import ShortConv
from anymixer.mixers.base import register_mixer
from anymixer.mixers.linear_recurrent import ElementwiseMixer, RecurrenceInputs


def _one_number(read: Tensor, write: Tensor, value: Tensor, log_decay: Tensor, rest: Any) -> RecurrenceInputs:
    """Inputs of a recurrence with a single number of state per channel, from [..., channels] each."""
    return RecurrenceInputs(read[..., None], write[..., None], value[..., None], log_decay[..., None], rest)


@register_mixer("hgrn")
class HGRN(ElementwiseMixer):
    """h_t = f h_{t-1} + (1 - f) v per channel, read by an output gate."""

    @dataclass(kw_only=True)
    class Config(ElementwiseMixer.Config):
        """lower_bound: of the forget gate. norm_eps: of the norm before the output projection."""

        ALWAYS_CAUSAL: ClassVar[bool] = True

        lower_bound: float = 0.0
        norm_eps: float = 1e-5
        bias: bool = False

        def validate(self, d_model: int, path: str) -> None:
            if not 0 <= self.lower_bound < 1:
                raise UserError(f"{path}.lower_bound: {self.lower_bound} is not in [0, 1)")

    def __init__(self, d_model: int, *, layer_idx: int | None = None, **options: Any) -> None:
        """d_model: width in and out; options: the fields of `Config`."""
        super().__init__()
        config = self.Config(**options)
        config.validate(d_model, type(self).__name__)
        self.config = config
        self.nheads, self.d_state, self.conv = d_model, 1, None
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=config.bias)
        self.norm = nn.RMSNorm(d_model, eps=config.norm_eps)
        self.out_proj = nn.Linear(d_model, d_model, bias=config.bias)

    def _project(self, hidden_states: Tensor) -> tuple[Tensor, Any]:
        return self.in_proj(hidden_states), None

    def _inputs(self, convolved: Tensor, passed: Any) -> RecurrenceInputs:
        values, outputs, gates = convolved.chunk(3, dim=-1)
        gates = gates.to(torch.promote_types(gates.dtype, torch.float32))
        write = (1 - self.config.lower_bound) * torch.sigmoid(-gates)
        log_decay = torch.log1p(-write.clamp(max=1 - torch.finfo(write.dtype).eps))
        return _one_number(silu(outputs), write, silu(values), log_decay, None)

    def _finish(self, mixed: Tensor, inputs: RecurrenceInputs) -> Tensor:
        return self.out_proj(self.norm(mixed[..., 0]))


@register_mixer("qlstm")
class QLSTM(ElementwiseMixer):
    """The quasi-LSTM: forget, input and output gates of the token alone, so that it trains in parallel."""

    @dataclass(kw_only=True)
    class Config(ElementwiseMixer.Config):
        """expand: inner width over d_model. d_conv: width of the convolution before the gates; 0 leaves it out.
        reversed_sigmoid: a forget gate of sigmoid(-f)^a with a learned a >= 0, which is what a state-space model's
        exp(-a softplus(f)) is."""

        ALWAYS_CAUSAL: ClassVar[bool] = True

        expand: int = 2
        d_conv: int = 4
        reversed_sigmoid: bool = False

        def validate(self, d_model: int, path: str) -> None:
            for key, lowest in (("expand", 1), ("d_conv", 0)):
                if getattr(self, key) < lowest:
                    raise UserError(f"{path}.{key}: {getattr(self, key)} is below {lowest}")

    def __init__(self, d_model: int, *, layer_idx: int | None = None, **options: Any) -> None:
        """d_model: width in and out; options: the fields of `Config`."""
        super().__init__()
        config = self.Config(**options)
        config.validate(d_model, type(self).__name__)
        self.config = config
        self.nheads = self.d_inner = config.expand * d_model
        self.d_state = 1
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv = ShortConv(self.d_inner, config.d_conv, activate=False) if config.d_conv else None
        self.gates = nn.Linear(self.d_inner, 3 * self.d_inner)
        if config.reversed_sigmoid:
            self.a = nn.Parameter(torch.empty(()))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        self.reset_own_parameters()

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        """The convolution, and an exponent of 1."""
        if self.conv is not None:
            self.conv.reset_parameters()
        if self.config.reversed_sigmoid:
            nn.init.ones_(self.a)

    def _project(self, hidden_states: Tensor) -> tuple[Tensor, Any]:
        gate, x = self.in_proj(hidden_states).chunk(2, dim=-1)
        return x, gate

    def _inputs(self, convolved: Tensor, passed: Any) -> RecurrenceInputs:
        forget, write, read = self.gates(convolved).chunk(3, dim=-1)
        forget = forget.to(torch.promote_types(forget.dtype, torch.float32))
        log_decay = relu(self.a) * logsigmoid(-forget) if self.config.reversed_sigmoid else logsigmoid(forget)
        return _one_number(torch.sigmoid(read), torch.sigmoid(write), convolved, log_decay, passed)

    def _finish(self, mixed: Tensor, inputs: RecurrenceInputs) -> Tensor:
        return self.out_proj(gelu(inputs.rest) * mixed[..., 0])
