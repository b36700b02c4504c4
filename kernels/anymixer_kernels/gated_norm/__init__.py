"""RMSNorm(x) * weight * silu(gate), the norm before the gate (Mamba-2, arXiv 2405.21060)."""

from torch import Tensor

from anymixer_kernels.backend import current_backend
from anymixer_kernels.gated_norm.reference import gated_norm_reference
from anymixer_kernels.gated_norm.torch_form import GatedNorm

__all__ = ["gated_norm", "gated_norm_reference"]


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x, gate: [..., width]; weight: [width]; eps is added to the mean square. Computed in float32 or wider,
    returned in x's dtype."""
    if current_backend() == "reference":
        return gated_norm_reference(x, gate, weight, eps)
    return GatedNorm.apply(x, gate, weight, eps)  # type: ignore[return-value]
