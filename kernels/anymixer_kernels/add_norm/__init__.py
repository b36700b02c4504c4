"""LayerNorm(residual + branch): what follows a sublayer of a model that normalises after its residual sums."""

import torch
from torch import Tensor

from anymixer_kernels.add_norm.reference import add_norm_reference
from anymixer_kernels.add_norm.torch_form import add_norm_torch
from anymixer_kernels.backend import current_backend, takes_triton

__all__ = ["add_norm", "add_norm_reference", "add_norm_torch"]

# The widest row of the Triton form, where one program holds all of it in registers.
ONE_PROGRAM = 16384


def add_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """residual, branch: [..., width], of the same shape and any two dtypes; weight, bias: [width]; eps is added to
    the variance. Computed in float32 or wider; returned in `dtype`, by default residual's."""
    dtype = residual.dtype if dtype is None else dtype
    if torch.compiler.is_compiling() and current_backend() == "auto":
        # The compiler's own kernel takes the casts around it along.
        return add_norm_torch(residual, branch, weight, bias, eps, dtype)
    unsupported = f"rows wider than {ONE_PROGRAM}" if residual.shape[-1] > ONE_PROGRAM else None
    if takes_triton(residual, "add_norm", unsupported):
        from anymixer_kernels.add_norm.triton_form import add_norm_triton

        return add_norm_triton(residual, branch, weight, bias, eps, dtype)
    form = add_norm_reference if current_backend() == "reference" else add_norm_torch
    return form(residual, branch, weight, bias, eps, dtype)
