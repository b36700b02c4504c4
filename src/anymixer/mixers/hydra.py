"""Hydra: bidirectional state-space mixing through a quasiseparable matrix (arXiv 2407.09941)."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from anymixer_kernels.hydra_core import HydraParameters, hydra_core, split_projected
from anymixer_kernels.quasiseparable import QuasiseparableInputs, quasiseparable_matrix
from torch import Tensor, nn

from anymixer.errors import UserError
from anymixer.layers.norm import GatedRMSNorm
from anymixer.layers.packing import Packing
from anymixer.layers.param_hints import ParamHint
from anymixer.layers.step_sizes import draw_step_bias
from anymixer.mixers.base import SequenceMixer, register_mixer

DEFAULT_HEADDIM = 64


@register_mixer("hydra")
class Hydra(SequenceMixer):
    """The Hydra block; parameter names and shapes are the published ones, so its state dicts load strictly.

    Padding and neighbours in a packed row are kept out of the convolution and of both scans.
    """

    projects_first = True

    @dataclass(kw_only=True)
    class Config(SequenceMixer.Config):
        """Options, with the published defaults.

        headdim: None takes the largest divisor of expand * d_model up to 64. dt_min, dt_max, dt_init_floor:
        range of the initial step sizes, and their floor. dt_limit: clamp of the step sizes. conv_init: the
        convolution starts uniform in +-conv_init (None: torch's default). chunk_size: most tokens per
        chunk of the linear-time form, for long sequences. shift, free_diagonal: the two things that
        make the matrix quasiseparable rather than the sum of two scans; the paper's ablation (its Table 10)
        switches each off.
        """

        d_state: int = 64
        d_conv: int = 7
        conv_init: float | None = None
        expand: int = 2
        headdim: int | None = None
        ngroups: int = 1
        dt_min: float = 0.001
        dt_max: float = 0.1
        dt_init_floor: float = 1e-4
        dt_limit: tuple[float, float] = (0.0, math.inf)
        learnable_init_states: bool = False
        activation: Literal["swish", "silu"] = "swish"
        bias: bool = False
        conv_bias: bool = True
        chunk_size: int = 256
        shift: bool = True
        free_diagonal: bool = True

        def validate(self, d_model: int, path: str) -> None:
            for key in ("d_state", "d_conv", "expand", "ngroups", "chunk_size"):
                if getattr(self, key) < 1:
                    raise UserError(f"{path}.{key}: {getattr(self, key)} is not positive")
            if self.d_conv % 2 == 0:
                raise UserError(f"{path}.d_conv: {self.d_conv} is even; a centred convolution needs an odd width")
            d_inner = self.expand * d_model
            headdim = self.resolve_headdim(d_model)
            if headdim < 1 or d_inner % headdim:
                raise UserError(f"{path}.headdim: {headdim} does not divide expand * d_model = {d_inner}")
            if (d_inner // headdim) % self.ngroups:
                raise UserError(f"{path}.ngroups: {self.ngroups} does not divide the {d_inner // headdim} heads")

        def resolve_headdim(self, d_model: int) -> int:
            """The head width in use."""
            if self.headdim is not None:
                return self.headdim
            d_inner = self.expand * d_model
            return max(n for n in range(1, min(DEFAULT_HEADDIM, d_inner) + 1) if d_inner % n == 0)

    def __init__(
        self,
        d_model: int,
        *,
        layer_idx: int | None = None,
        use_mem_eff_path: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        """d_model: width in and out; options: the fields of `Config`.

        use_mem_eff_path and layer_idx are accepted because published calls pass them; neither has an effect.
        """
        super().__init__()
        config = self.Config(**options)
        config.validate(d_model, type(self).__name__)
        self.config = config
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_inner = config.expand * d_model
        self.headdim = config.resolve_headdim(d_model)
        self.nheads = self.d_inner // self.headdim
        conv_width = self.d_inner + 4 * config.ngroups * config.d_state
        self._split = (self.d_inner, conv_width, 2 * self.nheads)

        self.in_proj = nn.Linear(d_model, sum(self._split), bias=config.bias, **factory)
        self.conv1d = nn.Conv1d(
            conv_width,
            conv_width,
            config.d_conv,
            padding=config.d_conv // 2,
            groups=conv_width,
            bias=config.conv_bias,
            **factory,
        )
        self.dt_bias = nn.Parameter(torch.empty(self.nheads, **factory))
        self.A_log = nn.Parameter(torch.empty(self.nheads, **factory))
        if config.free_diagonal:
            self.D = nn.Parameter(torch.empty(self.nheads, **factory))
            self.fc_D = nn.Linear(self.d_inner, self.nheads, bias=False, **factory)
        self.norm = GatedRMSNorm(self.d_inner, eps=1e-5, **factory)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=config.bias, **factory)
        if config.learnable_init_states:
            self.init_states = nn.Parameter(torch.empty(self.nheads, self.headdim, config.d_state, **factory))
        self.reset_own_parameters()

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        """dt log-uniform in [dt_min, dt_max] (stored through softplus' inverse), A = -1, D = 1, the convolution."""
        config = self.config
        self.conv1d.reset_parameters()
        if config.conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -config.conv_init, config.conv_init)
        draw_step_bias(self.dt_bias, config.dt_min, config.dt_max, config.dt_init_floor)
        nn.init.zeros_(self.A_log)
        if config.free_diagonal:
            nn.init.ones_(self.D)
        if config.learnable_init_states:
            nn.init.zeros_(self.init_states)

    def param_hints(self) -> dict[str, ParamHint]:
        """The recurrence's own parameters are kept out of weight decay, as the paper's authors marked them."""
        names = ("dt_bias", "A_log", "D", "init_states")
        return {name: ParamHint(weight_decay=False) for name in names if hasattr(self, name)}

    def core_parameters(self) -> HydraParameters:
        """What lies between the two projections."""
        config = self.config
        wide = torch.promote_types(self.A_log.dtype, torch.float32)
        return HydraParameters(
            conv_weight=self.conv1d.weight,
            conv_bias=self.conv1d.bias,
            dt_bias=self.dt_bias,
            A=-torch.exp(self.A_log.to(wide)),
            norm_weight=self.norm.weight,
            D=self.D if config.free_diagonal else None,
            fc_D=self.fc_D if config.free_diagonal else None,
            initial_state=self.init_states if config.learnable_init_states else None,
            headdim=self.headdim,
            d_state=config.d_state,
            ngroups=config.ngroups,
            dt_limit=config.dt_limit,
            shift=config.shift,
            eps=self.norm.eps,
            chunk_size=config.chunk_size,
        )

    def _mixing_inputs(self, hidden_states: Tensor, packing: Packing | None) -> QuasiseparableInputs:
        ids = None if packing is None else packing.sequence_id
        packed = packing is not None and packing.packed
        return split_projected(self.in_proj(hidden_states), self.core_parameters(), ids, packed=packed)[1]

    def forward(self, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """[batch, length, d_model] -> the same shape; see `SequenceMixer.forward`."""
        ids = None if packing is None else packing.sequence_id
        packed = packing is not None and packing.packed
        return self.out_proj(hydra_core(self.in_proj(hidden_states), self.core_parameters(), ids, packed=packed))

    def matrix(self, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """M per head: [batch, nheads, length, length] (without what learnable initial states add)."""
        return quasiseparable_matrix(self._mixing_inputs(hidden_states, packing))

    def values(self, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """x per head: [batch, nheads, length, headdim]."""
        return self._mixing_inputs(hidden_states, packing).x.transpose(1, 2)

    def output(self, mixed: Tensor, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """Gated norm and projection of [batch, nheads, length, headdim]."""
        gate = self.in_proj(hidden_states)[..., : self.d_inner]
        return self.out_proj(self.norm(mixed.transpose(1, 2).flatten(-2), gate))
