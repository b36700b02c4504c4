"""S4D (arXiv 2206.11893): a diagonal state space for every channel, whose kernel is a sum of damped cosines."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from anymixer_kernels.blockwise import wide
from torch import Tensor, nn

from anymixer.errors import UserError
from anymixer.layers.discretize import Pair, bilinear, hold, times
from anymixer.layers.hippo import diagonal_plus_low_rank
from anymixer.layers.param_hints import ParamHint
from anymixer.mixers.base import register_mixer
from anymixer.mixers.lti import DiagonalSystem, LTIMixer, StateSpaceMixer

# The largest entry of B: the frequencies that HiPPO weighs most are above what steps of the usual size resolve.
B_CLIP = 2.0


class ContinuousSSM(StateSpaceMixer):
    """What S4 and its diagonal relatives share: step sizes, A, B and C.

    Steps, A and B have a learning rate of their own, and float32 at least whatever the other weights are cast to: a
    kernel compounds what they are rounded by with every lag (bfloat16 weights moved S4D's by a third of their norm).
    """

    @dataclass(kw_only=True)
    class Config(LTIMixer.Config):
        """d_state: real numbers in a channel's state. n_ssm: how many copies of A and B the channels share; None is
        one a channel. dt_min, dt_max: range of the initial step sizes, whose inverse is how many tokens a kernel
        reaches. rate: multiplies all steps, 2 for inputs sampled half as often as those trained on. ssm_lr: learning
        rate of steps, A and B; None takes the optimizer's."""

        d_state: int = 64
        n_ssm: int | None = None
        dt_min: float = 0.001
        dt_max: float = 0.1
        rate: float = 1.0
        ssm_lr: float | None = 1e-3

        def validate(self, d_model: int, path: str) -> None:
            super().validate(d_model, path)
            channels = d_model // self.bottleneck
            if self.d_state < 2 or self.d_state % 2:
                raise UserError(f"{path}.d_state: {self.d_state} is not an even number from 2")
            if self.n_ssm is not None and (self.n_ssm < 1 or channels % self.n_ssm):
                raise UserError(f"{path}.n_ssm: {self.n_ssm} does not divide the {channels} channels")
            if not 0 < self.dt_min <= self.dt_max:
                raise UserError(f"{path}.dt_min: {self.dt_min} and dt_max = {self.dt_max} are no range of step sizes")
            if self.rate <= 0:
                raise UserError(f"{path}.rate: {self.rate} is not above 0")

    config: Config
    log_dt: Tensor
    C: Tensor
    dynamics: tuple[str, ...] = ("log_dt", "log_A_real", "A_imag", "B", "P")

    @staticmethod
    def _make_dynamics(*shape: int) -> nn.Parameter:
        """A parameter, not filled, in float32 where models are built in less."""
        return nn.Parameter(wide(torch.empty(shape)))

    def _own_dynamics(self) -> dict[str, Tensor]:
        """Steps, A and B by name."""
        return {name: getattr(self, name) for name in self.dynamics if hasattr(self, name)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What `to`, `half` and the like call."""
        precise = [tensor for t in self._own_dynamics().values() for tensor in (t, t.grad)]

        def apply(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            rounded = any(tensor is t for t in precise) and wide(applied).dtype != applied.dtype
            return tensor.to(applied.device, torch.float32) if rounded else applied

        return super()._apply(apply, recurse)

    def param_hints(self) -> dict[str, ParamHint]:
        """No weight decay and an own learning rate for steps, A and B."""
        hint = ParamHint(weight_decay=False, lr=self.config.ssm_lr)
        return {name: hint for name, tensor in self._own_dynamics().items() if isinstance(tensor, nn.Parameter)}

    def _steps(self) -> Tensor:
        """dt, [channels, 1]."""
        return torch.exp(wide(self.log_dt))[:, None] * self.config.rate

    def _of_channels(self, parameter: Tensor) -> Tensor:
        """The copy of each channel: [n_ssm, ...] -> [channels, ...]; channel h has copy h mod n_ssm."""
        return wide(parameter).repeat(self.channels // parameter.shape[0], *[1] * (parameter.dim() - 1))

    def _readouts(self) -> list[Tensor]:
        """C of earlier tokens, and of later ones if there are such."""
        return [wide(C) for C in self.C]


@register_mixer("s4d")
class S4D(ContinuousSSM):
    """K_l = 2 Re sum_n C_n B_bar_n exp(l dt A_n); causal, or with a second C for the later tokens."""

    @dataclass(kw_only=True)
    class Config(ContinuousSSM.Config):
        """init: of A: lin, frequencies pi n; inv, the inverse law that approximates HiPPO's; legs, HiPPO-LegS's own
        normal part (with its B); rand, exponentials of normal numbers; real, decays 1 .. d_state without
        oscillation. disc: zero-order hold or the bilinear rule."""

        init: Literal["lin", "inv", "legs", "rand", "real"] = "lin"
        disc: Literal["zoh", "bilinear"] = "zoh"

        def validate(self, d_model: int, path: str) -> None:
            super().validate(d_model, path)
            if self.init == "real" and self.disc == "bilinear":
                raise UserError(f"{path}.disc: bilinear turns fast real decays into oscillations; take zoh")

    config: Config

    def __init__(self, d_model: int, *, layer_idx: int | None = None, **options: Any) -> None:
        """d_model: width in and out; options: the fields of `Config`."""
        super().__init__()
        config = self.Config(**options)
        self._make_layers(d_model, config)
        self.state_width = config.d_state
        copies = config.n_ssm or self.channels
        self.real = config.init == "real"
        modes, parts = (config.d_state, 1) if self.real else (config.d_state // 2, 2)
        self.log_dt = self._make_dynamics(self.channels)
        self.log_A_real = self._make_dynamics(copies, modes)
        if not self.real:
            self.A_imag = self._make_dynamics(copies, modes)
        self.B = self._make_dynamics(copies, modes, parts)
        self.C = nn.Parameter(torch.empty(1 if config.causal else 2, self.channels, modes, parts))
        self.reset_own_parameters()

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        """dt log-uniform, A by `init`, |C|^2 = 1 on average, D normal."""
        config = self.config
        self.log_dt.uniform_(math.log(config.dt_min), math.log(config.dt_max))
        self.C.normal_(std=math.sqrt(1 / self.C.shape[-1]))
        self.D.normal_()
        modes = self.log_A_real.shape[1]
        n = torch.arange(modes, dtype=torch.float32, device=self.D.device)
        self.B.zero_()
        self.B[..., 0] = 1.0
        if self.real:
            self.log_A_real.copy_(torch.log(n + 1).expand_as(self.log_A_real))
            return
        self.log_A_real.fill_(math.log(0.5))
        if config.init == "rand":
            self.A_imag.normal_().exp_()
        elif config.init == "legs":
            form = diagonal_plus_low_rank("legs", config.d_state)
            self.A_imag.copy_(form.eigenvalues.imag.float().expand_as(self.A_imag))
            self.B[..., 0] = form.B.real.float().clamp(max=B_CLIP).to(self.B.device)
        else:
            size = config.d_state
            by_inverse = size / math.pi * (size / (2 * n + 1) - 1)
            self.A_imag.copy_((math.pi * n if config.init == "lin" else by_inverse).expand_as(self.A_imag))

    def _discretize(self, A: Pair, dt: Tensor) -> tuple[Tensor, Tensor, Pair]:
        """The logarithm of A_bar, real and imaginary part, and B_bar / B."""
        return (hold if self.config.disc == "zoh" else bilinear)(A, dt)

    def _discrete(self) -> tuple[Tensor, Tensor, Pair]:
        """The logarithm of A_bar, and B_bar, of every channel and mode."""
        re = -torch.exp(self._of_channels(self.log_A_real))
        im = torch.zeros_like(re) if self.real else self._of_channels(self.A_imag)
        log_decay, angle, drive = self._discretize((re, im), self._steps())
        return log_decay, angle, times(self._as_pair(self._of_channels(self.B)), drive)

    def _as_pair(self, parts: Tensor) -> Pair:
        return (parts[..., 0], torch.zeros_like(parts[..., 0])) if self.real else (parts[..., 0], parts[..., 1])

    def systems(self) -> tuple[DiagonalSystem, DiagonalSystem | None]:
        """See `StateSpaceMixer.systems`."""
        log_decay, angle, B = self._discrete()
        found = []
        for readout in self._readouts():
            re, im = times(self._as_pair(readout), B)
            found.append(
                DiagonalSystem(log_decay, re) if self.real else DiagonalSystem(log_decay, 2 * re, angle, 2 * im)
            )
        return found[0], found[1] if len(found) > 1 else None
