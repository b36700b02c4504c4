"""Sequence-mixing operations, each as one folder: a public typed function, the definition of correct
(`reference.py`, pure PyTorch, exact in float64) and the fast forms.

    from anymixer_kernels.quasiseparable import quasiseparable

Depends on torch alone (and on Triton where it is installed); knows nothing of the `anymixer` package.
"""

from anymixer_kernels.backend import BACKENDS, current_backend, force_backend

__all__ = ["BACKENDS", "current_backend", "force_backend"]
