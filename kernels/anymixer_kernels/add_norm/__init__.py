"""LayerNorm(residual + branch): what follows a sublayer of a model that normalises after its residual sums."""

import torch
from torch import Tensor

from anymixer_kernels.add_norm.reference import add_norm_reference
from anymixer_kernels.add_norm.torch_form import add_norm_torch
from anymixer_kernels.backend import current_backend, takes_triton

__all__ = ["add_norm", "add_norm_and_copy", "add_norm_reference", "add_norm_torch"]

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
    if _takes_triton(residual):
        from anymixer_kernels.add_norm.triton_form import add_norm_triton

        return add_norm_triton(residual, branch, weight, bias, eps, dtype)
    form = add_norm_reference if current_backend() == "reference" else add_norm_torch
    return form(residual, branch, weight, bias, eps, dtype)


def add_norm_and_copy(
    residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float, copy_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`add_norm` in residual's dtype, and the same rounded to `copy_dtype`, for a product that would cast it.

    The Triton form writes both at once, and adds the gradients of both where it reads them.
    """
    if _takes_triton(residual):
        from anymixer_kernels.add_norm.triton_form import add_norm_and_copy_triton

        return add_norm_and_copy_triton(residual, branch, weight, bias, eps, copy_dtype)
    normalised = add_norm(residual, branch, weight, bias, eps)
    return normalised, normalised.to(copy_dtype)


def _takes_triton(residual: Tensor) -> bool:
    if torch.compiler.is_compiling() and current_backend() == "auto":
        # The compiler's own kernel takes the casts around it along.
        return False
    unsupported = f"rows wider than {ONE_PROGRAM}" if residual.shape[-1] > ONE_PROGRAM else None
    return takes_triton(residual, "add_norm", unsupported)
