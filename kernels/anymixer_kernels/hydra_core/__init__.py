"""All of a Hydra block that lies between its two projections, as one op (arXiv 2407.09941; its published code):

    gate, xBC, steps = split(projected)
    x, B_f, C_f, B_b, C_b = split(silu(depthwise_conv(xBC)))
    Y = M x       M quasiseparable, with dt = softplus(steps + dt_bias) and diagonal x fc_D^T + D
    out = RMSNorm(Y) norm_weight silu(gate)

On a GPU one pass forward and one backward keep `projected`, Y, the diagonal and, in long rows, a state a chunk; the
convolution is computed again.
"""

import math

from torch import Tensor, nn

from anymixer_kernels.backend import current_backend, takes_triton
from anymixer_kernels.gated_norm import gated_norm
from anymixer_kernels.hydra_core.parts import HydraParameters, split_projected
from anymixer_kernels.quasiseparable import quasiseparable
from anymixer_kernels.quasiseparable.limits import no_triton_form_of_size

__all__ = ["HydraParameters", "hydra_core", "split_projected"]


def hydra_core(
    projected: Tensor, parameters: HydraParameters, sequence_id: Tensor | None = None, *, packed: bool = True
) -> Tensor:
    """What the block's output projection reads: [batch, length, d_inner] in the dtype of `projected`.

    projected: [batch, length, 2 d_inner + 4 ngroups d_state + 2 nheads], the input projection's. sequence_id: [batch,
    length], -1 for padding; packed: False promises at most one sequence a row.
    """
    whole = current_backend() != "mamba_ssm"  # which has a form for the mixing alone
    if whole and takes_triton(projected, "Hydra's core", _no_triton_form_for(parameters, projected)):
        from anymixer_kernels.hydra_core.triton_form import hydra_core_triton

        return hydra_core_triton(projected, parameters, sequence_id)
    gate, inputs = split_projected(projected, parameters, sequence_id, packed=packed)
    mixed = quasiseparable(inputs, chunk_size=parameters.chunk_size)
    return gated_norm(mixed.flatten(-2), gate, parameters.norm_weight, parameters.eps)


def _no_triton_form_for(parameters: HydraParameters, projected: Tensor) -> str | None:
    if not parameters.shift or parameters.initial_state is not None:
        return "initial states, or reading without the shift"
    if parameters.dt_limit != (0.0, math.inf):
        return "limits of the step sizes"
    if parameters.fc_D is not None and type(parameters.fc_D) is not nn.Linear:
        return "an adapter on fc_D"
    return no_triton_form_of_size(projected.shape[1], parameters.headdim, parameters.d_state, projected.dtype)
