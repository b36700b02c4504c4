"""The matrix-mixer block (Hydra, arXiv 2407.09941, sections 2 and 4.1): a structured matrix M, applied to values
between a convolution and a gate.

    u -> in_proj -> [z | v, factors] -> convolution -> SiLU(v) -> M v + v -> gated norm with z -> out_proj

A family of matrices is a `Structure`; a registered mixer is the block with one of them. "Data-dependent" (DD)
structures read their factors from the input and work at any length; "data-independent" (DI) ones hold them as
parameters, up to `max_seq_len` positions.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from anymixer_kernels.depthwise_conv import depthwise_conv
from torch import Tensor, nn

from anymixer.errors import UserError, suggest
from anymixer.layers.norm import GatedRMSNorm
from anymixer.layers.packing import Packing
from anymixer.layers.param_hints import ParamHint
from anymixer.mixers.base import SequenceMixer, mixers

DEFAULT_HEADDIM = 128
# Standard deviation of data-dependent queries and keys at init, for inputs of unit variance.
FACTOR_STD = 1.1


class Structure(nn.Module):
    """A family of matrices: what it reads from the input, and how it mixes values.

    conv_channels, plain_channels: how many channels of the input projection are its factors, those that go through
    the convolution and those that do not. activates: whether the convolved ones go through SiLU. residual: whether
    the block adds the values to the mixture.
    """

    residual: ClassVar[bool] = True
    activates: ClassVar[bool] = False

    def __init__(self, config: Any, nheads: int, headdim: int) -> None:
        """config: the block's `Config`."""
        super().__init__()
        self.config = config
        self.nheads, self.headdim = nheads, headdim
        self.conv_channels = 2 * nheads * config.qk_dim if config.is_data_dependent else 0
        self.plain_channels = 0

    def mix(self, v: Tensor, factors: Tensor, packing: Packing | None) -> Tensor:
        """M V. v: [batch, length, nheads, headdim], zero at padding; factors: [batch, length, channels], the
        convolved ones first. Returns v's shape; rows at padding are meaningless but finite."""
        raise NotImplementedError

    def mix_and_add(self, v: Tensor, factors: Tensor, packing: Packing | None) -> Tensor:
        """M V, and + V where the structure asks for it; arguments as in `mix`."""
        mixed = self.mix(v, factors, packing)
        return mixed + v if self.residual else mixed

    def matrix(self, v: Tensor, factors: Tensor, packing: Packing | None) -> Tensor:
        """M: [batch, nheads, length, length], zero between sequences; arguments as in `mix`."""
        raise NotImplementedError

    def reset(self) -> None:
        """Draw the structure's own parameters."""

    def add_position_factors(self) -> None:
        """Give a data-independent structure its own queries and keys: [max_seq_len, nheads, qk_dim] each."""
        config = self.config
        if not config.is_data_dependent:
            assert config.max_seq_len is not None
            self.q_matrix = nn.Parameter(torch.empty(config.max_seq_len, self.nheads, config.qk_dim))
            self.k_matrix = nn.Parameter(torch.empty(config.max_seq_len, self.nheads, config.qk_dim))

    def reset_position_factors(self, *, std: float, mean: float = 0.0) -> None:
        """Draw them: normal for balanced init, Xavier's as published."""
        if self.config.is_data_dependent:
            return
        for matrix in (self.q_matrix, self.k_matrix):
            if self.config.balanced():
                nn.init.normal_(matrix, mean=mean, std=std)
            else:
                nn.init.xavier_normal_(matrix)

    def factor_std(self) -> float:
        """Standard deviation that data-dependent factors should start with, before any SiLU."""
        return FACTOR_STD

    def param_hints(self) -> dict[str, ParamHint]:
        """Training hints by parameter name."""
        return {}

    def queries_and_keys(self, factors: Tensor) -> tuple[Tensor, Tensor]:
        """Split factors into q and k: [batch, length, nheads, qk_dim] each."""
        q, k = factors.unflatten(-1, (2, self.nheads, -1)).unbind(-3)
        return q, k

    def scale_of_rows(self, v: Tensor, packing: Packing | None, width: int = 1) -> Tensor | float:
        """1 / sqrt(length * width), with each token's own sequence's length: a number, or [batch, length]."""
        if self.config.parity == "reference" and self.config.max_seq_len is not None:
            return 1 / math.sqrt(self.config.max_seq_len * width)
        if packing is None:
            return 1 / math.sqrt(v.shape[1] * width)
        wide = torch.promote_types(v.dtype, torch.float32)
        return torch.rsqrt(packing.lengths().to(wide) * width)

    def row_scale(self, v: Tensor, packing: Packing | None, width: int = 1) -> Tensor | float:
        """`scale_of_rows` as a factor of [batch, length, nheads, headdim]."""
        scale = self.scale_of_rows(v, packing, width)
        return scale.to(v.dtype)[:, :, None, None] if isinstance(scale, Tensor) else scale

    def scale_rows(self, matrix: Tensor, v: Tensor, packing: Packing | None, width: int = 1) -> Tensor:
        """Multiply M [batch, nheads, length, length] by `row_scale`."""
        scale = self.row_scale(v, packing, width)
        return matrix * (scale.transpose(1, 2) if isinstance(scale, Tensor) else scale)


class MatrixMixerBlock(SequenceMixer):
    """Convolution, structured matrix, gate; parameter names and shapes are the published ones."""

    projects_first = True
    structure: ClassVar[type[Structure]]
    matrix_mixer_type: ClassVar[str]

    @dataclass(kw_only=True)
    class Config(SequenceMixer.Config):
        """Options, with the published defaults.

        is_data_dependent: whether the matrix is read from the input. qk_dim: dimensions of queries and keys per
        head. max_seq_len: most positions of a data-independent matrix. headdim: None takes the largest divisor of
        expand * d_model up to 128. parity: "reference" repeats the published code where it differs from the
        equations, and its constant 1 / sqrt(max_seq_len). init: "balanced" starts every matrix at a comparable
        size, "reference" as published; None follows parity.
        """

        is_data_dependent: bool = True
        qk_dim: int = 16
        max_seq_len: int | None = None
        expand: int = 2
        headdim: int | None = None
        d_conv: int = 7
        bias: bool = False
        conv_bias: bool = True
        parity: Literal["exact", "reference"] = "exact"
        init: Literal["balanced", "reference"] | None = None

        def validate(self, d_model: int, path: str) -> None:
            for key in ("expand", "d_conv", "max_seq_len"):
                if (value := getattr(self, key)) is not None and value < 1:
                    raise UserError(f"{path}.{key}: {value} is not positive")
            if self.uses_qk_dim() and self.qk_dim < 1:
                raise UserError(f"{path}.qk_dim: {self.qk_dim} is not positive")
            if self.d_conv % 2 == 0:
                raise UserError(f"{path}.d_conv: {self.d_conv} is even; a centred convolution needs an odd width")
            d_inner, headdim = self.expand * d_model, self.resolve_headdim(d_model)
            if headdim < 1 or d_inner % headdim:
                raise UserError(f"{path}.headdim: {headdim} does not divide expand * d_model = {d_inner}")
            if self.needs_max_seq_len() and self.max_seq_len is None:
                raise UserError(f"{path}.max_seq_len: missing; a data-independent matrix has a fixed size")

        def uses_qk_dim(self) -> bool:
            """Whether the matrix has queries and keys."""
            return True

        def needs_max_seq_len(self) -> bool:
            """Whether the matrix has parameters for every position."""
            return not self.is_data_dependent

        def longest_row(self) -> int | None:
            return None if self.is_data_dependent else self.max_seq_len

        def resolve_headdim(self, d_model: int) -> int:
            """The head width in use."""
            if self.headdim is not None:
                return self.headdim
            d_inner = self.expand * d_model
            return max(n for n in range(1, min(DEFAULT_HEADDIM, d_inner) + 1) if d_inner % n == 0)

        def balanced(self) -> bool:
            """Whether `init` comes to "balanced"."""
            return self.init == "balanced" if self.init is not None else self.parity != "reference"

    def __init__(
        self,
        d_model: int,
        *,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        """d_model: width in and out; options: the fields of `Config`. layer_idx has no effect."""
        super().__init__()
        config = self.Config(**options)
        config.validate(d_model, type(self).__name__)
        self.config = config
        self.d_inner = config.expand * d_model
        self.headdim = config.resolve_headdim(d_model)
        self.nheads = self.d_inner // self.headdim
        with nullcontext() if device is None else torch.device(device):
            self.matrix_mixer = self._structure()(config, self.nheads, self.headdim)
            conv_width = self.d_inner + self.matrix_mixer.conv_channels
            self._split = (
                self.d_inner,
                self.d_inner,
                self.matrix_mixer.conv_channels,
                self.matrix_mixer.plain_channels,
            )
            self.in_proj = nn.Linear(d_model, sum(self._split), bias=config.bias)
            self.conv1d = nn.Conv1d(
                conv_width,
                conv_width,
                config.d_conv,
                padding=config.d_conv // 2,
                groups=conv_width,
                bias=config.conv_bias,
            )
            self.norm = GatedRMSNorm(self.d_inner, eps=1e-5)
            self.out_proj = nn.Linear(self.d_inner, d_model, bias=config.bias)
        if dtype is not None:
            self.to(dtype)
        self.reset_own_parameters()

    def _structure(self) -> type[Structure]:
        return self.structure

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        """The convolution and the structure; with balanced init, factors of a known variance."""
        self.conv1d.reset_parameters()
        self.matrix_mixer.reset()
        if self.config.balanced() and self.matrix_mixer.conv_channels:
            self._balance_factors()

    def _balance_factors(self) -> None:
        """Scale the factors' convolution so that, for inputs of unit variance, each channel has `factor_std`."""
        convolved = slice(self.d_inner, None)
        incoming = self.in_proj.weight[2 * self.d_inner :][: self.matrix_mixer.conv_channels].norm(dim=1)
        taps = torch.randn_like(self.conv1d.weight[convolved])
        wanted = self.matrix_mixer.factor_std() / (taps.flatten(1).norm(dim=1) * incoming)
        self.conv1d.weight[convolved] = taps * wanted[:, None, None]
        if self.conv1d.bias is not None:
            self.conv1d.bias[convolved] = 0.0

    def param_hints(self) -> dict[str, ParamHint]:
        """The structure's own."""
        return {f"matrix_mixer.{name}": hint for name, hint in self.matrix_mixer.param_hints().items()}

    def _project(self, hidden_states: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor, Tensor]:
        """gate [batch, length, d_inner], v [batch, length, nheads, headdim], factors [batch, length, channels]."""
        self._check_length(hidden_states.shape[1])
        # One split, whose gradient is one concatenation: slices of slices would each fill a tensor of zeros.
        gate, v, factors, plain = self.in_proj(hidden_states).split(self._split, dim=-1)
        v = self._convolve(v, slice(self.d_inner), packing, True)
        if self.matrix_mixer.conv_channels:
            factors = self._convolve(factors, slice(self.d_inner, None), packing, self.matrix_mixer.activates)
        if packing is not None:
            v = torch.where(packing.real[..., None], v, 0.0)
        if plain.shape[-1]:
            factors = torch.cat([factors, plain], dim=-1)
        return gate, v.unflatten(-1, (self.nheads, self.headdim)), factors

    def _convolve(self, x: Tensor, channels: slice, packing: Packing | None, activate: bool) -> Tensor:
        """x by the kernels of `channels`."""
        return depthwise_conv(
            x,
            self.conv1d.weight[channels],
            None if self.conv1d.bias is None else self.conv1d.bias[channels],
            sequence_id=None if packing is None else packing.sequence_id,
            packed=packing is not None and packing.packed,
            activate=activate,
        )

    def _check_length(self, length: int) -> None:
        longest = self.config.longest_row()
        if longest is not None and length > longest:
            raise UserError(
                f"max_seq_len: a row of {length} tokens is longer than max_seq_len = {longest}, to which the "
                f"data-independent {self.matrix_mixer_type} matrix is fixed"
            )

    def _finish(self, mixed: Tensor, gate: Tensor) -> Tensor:
        return self.out_proj(self.norm(mixed.flatten(-2), gate))

    def forward(self, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """[batch, length, d_model] -> the same shape; see `SequenceMixer.forward`."""
        gate, v, factors = self._project(hidden_states, packing)
        return self._finish(self.matrix_mixer.mix_and_add(v, factors, packing), gate)

    def matrix(self, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """M with its scale, without the residual: [batch, nheads, length, length]."""
        _, v, factors = self._project(hidden_states, packing)
        return self.matrix_mixer.matrix(v, factors, packing)

    def values(self, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """V per head: [batch, nheads, length, headdim]."""
        return self._project(hidden_states, packing)[1].transpose(1, 2)

    def output(self, mixed: Tensor, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """Residual, gated norm and projection of [batch, nheads, length, headdim]."""
        gate, v, _ = self._project(hidden_states, packing)
        mixed = mixed.transpose(1, 2)
        return self._finish(mixed + v if self.matrix_mixer.residual else mixed, gate)


def MatrixMixer(
    matrix_mixer_type: str,
    is_data_dependent: bool,
    d_model: int,
    qk_dim: int = -1,
    max_seq_len: int | None = None,
    **options: Any,
) -> MatrixMixerBlock:
    """The published constructor: the block with the named kind of matrix.

    matrix_mixer_type: dense, toeplitz, vandermonde, cauchy, low_rank, attention or quasiseparable. max_seq_len:
    needed by data-independent ones. options: further fields of that mixer's `Config`, e.g. parity="reference".
    """
    blocks = {
        cls.matrix_mixer_type: cls for cls in map(mixers.get, mixers.names()) if issubclass(cls, MatrixMixerBlock)
    }
    if matrix_mixer_type not in blocks:
        known = ", ".join(sorted(blocks))
        hint = suggest(matrix_mixer_type, blocks)
        raise UserError(f"matrix_mixer_type: unknown matrix '{matrix_mixer_type}'{hint} (known: {known})")
    options |= {"is_data_dependent": is_data_dependent, "qk_dim": qk_dim, "max_seq_len": max_seq_len}
    return blocks[matrix_mixer_type](d_model, **options)
