"""What the Triton forms share. Imported by them alone: it imports Triton."""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

# Kernels run in NumPy on the CPU, where a product of bfloat16 gives wrong numbers (Triton 3.3 and 3.6).
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def dot_options(dtype: torch.dtype) -> dict[str, object]:
    """The type that tl.dot's operands are cast to, and its precision, for inputs of `dtype`: for float32 three products
    of the tensor cores ("tf32x3"), which together keep its digits; one for narrower types."""
    if INTERPRETED:
        return {"DOT": tl.float32, "PRECISION": "ieee"}
    if dtype == torch.float32:
        return {"DOT": tl.float32, "PRECISION": "tf32x3"}
    return {"DOT": tl.bfloat16 if dtype == torch.bfloat16 else tl.float16, "PRECISION": "tf32"}


def block_of(size: int, least: int = 16) -> int:
    """The power of two that covers `size`, at least what tl.dot takes."""
    return max(least, triton.next_power_of_2(size))


def contiguous_like(tensor: Tensor) -> Tensor:
    """An empty tensor of the shape, without the gaps and the order of axes that `torch.empty_like` keeps."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
