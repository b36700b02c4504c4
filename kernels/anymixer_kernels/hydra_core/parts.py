"""The parameters of Hydra's core, and its first half op by op, for whatever has no fused form."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from anymixer_kernels.depthwise_conv import depthwise_conv
from anymixer_kernels.quasiseparable.reference import QuasiseparableInputs


@dataclass(frozen=True)
class HydraParameters:
    """conv_weight: [d_inner + 4 ngroups d_state, 1, width], width odd; conv_bias: of its channels, or None. dt_bias,
    A (negative): [nheads]. D: [nheads] and fc_D: a projection from
    d_inner to nheads without bias, both None for a zero diagonal. norm_weight:
    [d_inner]. initial_state: [nheads, headdim, d_state] or None. dt_limit: clamp of the step sizes. shift: as in
    `QuasiseparableInputs`. eps: of the norm. chunk_size: as in `quasiseparable`."""

    conv_weight: Tensor
    conv_bias: Tensor | None
    dt_bias: Tensor
    A: Tensor
    norm_weight: Tensor
    D: Tensor | None
    fc_D: nn.Module | None
    initial_state: Tensor | None
    headdim: int
    d_state: int
    ngroups: int
    dt_limit: tuple[float, float] = (0.0, math.inf)
    shift: bool = True
    eps: float = 1e-5
    chunk_size: int = 256

    @property
    def d_inner(self) -> int:
        """Channels that are mixed."""
        return self.norm_weight.shape[0]

    @property
    def nheads(self) -> int:
        """Heads."""
        return self.dt_bias.shape[0]


def split_projected(
    projected: Tensor, parameters: HydraParameters, sequence_id: Tensor | None, *, packed: bool
) -> tuple[Tensor, QuasiseparableInputs]:
    """The gate [batch, length, d_inner], and what the mixing op reads; arguments as in `hydra_core`."""
    d_inner, nheads, ngroups = parameters.d_inner, parameters.nheads, parameters.ngroups
    states = ngroups * parameters.d_state
    gate, mixed, dt = projected.split([d_inner, d_inner + 4 * states, 2 * nheads], dim=-1)
    mixed = depthwise_conv(mixed, parameters.conv_weight, parameters.conv_bias, sequence_id=sequence_id, packed=packed)
    x, *projections = mixed.split([d_inner] + 4 * [states], dim=-1)
    B_f, C_f, B_b, C_b = (p.unflatten(-1, (ngroups, parameters.d_state)) for p in projections)
    wide = torch.promote_types(dt.dtype, torch.float32)
    dt = softplus(dt.to(wide).unflatten(-1, (2, nheads)) + parameters.dt_bias.to(wide))
    if parameters.dt_limit != (0.0, math.inf):
        dt = dt.clamp(*parameters.dt_limit)
    dt_f, dt_b = dt.unbind(dim=-2)
    diagonal = None
    if parameters.D is not None and parameters.fc_D is not None:
        diagonal = parameters.fc_D(x) + parameters.D.to(x.dtype)
    return gate, QuasiseparableInputs(
        x=x.unflatten(-1, (nheads, parameters.headdim)),
        dt=(dt_f, dt_b),
        A=parameters.A.to(wide),
        B=(B_f, B_b),
        C=(C_f, C_b),
        diagonal=diagonal,
        sequence_id=sequence_id,
        initial_state=parameters.initial_state,
        shift=parameters.shift,
    )
