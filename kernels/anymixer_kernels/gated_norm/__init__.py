"""RMSNorm(x) * weight * silu(gate), the norm before the gate (Mamba-2, arXiv 2405.21060)."""

from torch import Tensor

from anymixer_kernels.backend import current_backend, takes_triton
from anymixer_kernels.gated_norm.reference import gated_norm_reference
from anymixer_kernels.gated_norm.torch_form import GatedNorm

__all__ = ["gated_norm", "gated_norm_reference"]

# The widest row of the Triton form, where one program holds all of it in registers.
ONE_PROGRAM = 16384


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x, gate: [..., width]; weight: [width]; eps is added to the mean square. Computed in float32 or wider,
    returned in x's dtype."""
    unsupported = f"rows wider than {ONE_PROGRAM}" if x.shape[-1] > ONE_PROGRAM else None
    if takes_triton(x, "gated_norm", unsupported):
        from anymixer_kernels.gated_norm.triton_form import gated_norm_triton

        return gated_norm_triton(x, gate, weight, eps)
    if current_backend() == "reference":
        return gated_norm_reference(x, gate, weight, eps)
    return GatedNorm.apply(x, gate, weight, eps)  # type: ignore[return-value]
