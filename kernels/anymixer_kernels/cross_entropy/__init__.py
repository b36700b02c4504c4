"""Minus the log probability of one class a row: the loss of a language model over its vocabulary."""

import torch
from torch import Tensor

from anymixer_kernels.backend import current_backend, takes_triton
from anymixer_kernels.cross_entropy.reference import cross_entropy_reference
from anymixer_kernels.cross_entropy.torch_form import cross_entropy_torch

__all__ = ["cross_entropy", "cross_entropy_reference"]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """logits: [rows, classes]; targets: int64 [rows], a class each, or negative for a row that counts nothing: its
    loss and its gradient are 0. Returns [rows], in float32 or wider.

    The Triton form reads the logits once forward and once backward, and keeps one number a row beside them.
    """
    if torch.compiler.is_compiling() and current_backend() == "auto":
        # The compiler's own kernel takes the cast to float32 along.
        return cross_entropy_torch(logits, targets)
    if takes_triton(logits, "cross_entropy"):
        from anymixer_kernels.cross_entropy.triton_form import cross_entropy_triton

        return cross_entropy_triton(logits, targets)
    form = cross_entropy_reference if current_backend() == "reference" else cross_entropy_torch
    return form(logits, targets)
