"""Which implementation of an op runs.

`auto` (the default) is the fastest form for the input's device: `triton` on a GPU, `torch` elsewhere. `triton` is the
fused form, `torch` the fast pure-PyTorch form, and `reference` the slow, literal one that defines what is correct.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch", "reference")

_log = logging.getLogger(__name__)

# A plain global: torch.compile cannot trace through a context variable.
_forced = "auto"


def current_backend() -> str:
    """The backend in force: one of `BACKENDS`."""
    return _forced


@contextmanager
def force_backend(name: str) -> Iterator[None]:
    """Run every op inside the `with` block by backend `name`.

    Raises ValueError for a name that is not in `BACKENDS`.
    """
    global _forced
    before = _forced
    set_backend(name)
    try:
        yield
    finally:
        _forced = before


def set_backend(name: str) -> None:
    """Run every op by backend `name` from now on. Raises ValueError for a name that is not in `BACKENDS`."""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend '{name}': choose one of {', '.join(BACKENDS)}")
    global _forced
    _forced = name


def takes_triton(tensor: Tensor, op: str, unsupported: str | None = None) -> bool:
    """Whether `op` runs its Triton form on inputs like `tensor`.

    unsupported: what the call asks for that the Triton form does not have; None where it has all. With `auto`, what
    keeps a GPU from Triton is logged once. Raises RuntimeError where `triton` is forced and cannot run.
    """
    if _forced not in ("auto", "triton") or (_forced == "auto" and not tensor.is_cuda):
        return False
    if unsupported is None and tensor.dtype == torch.float64:
        unsupported = "float64"
    problem = triton_problem(tensor.device.type)
    if problem is None and unsupported is not None:
        problem = f"it has no form for {unsupported}"
    if problem is not None and _forced == "triton":
        raise RuntimeError(f"{op}: the triton backend was asked for, but {problem}")
    return _announce(op, problem)


@torch.compiler.assume_constant_result
def triton_problem(device_type: str) -> str | None:
    """Why Triton cannot run kernels for a kind of device, or None where it can: they are tried."""
    return _tried(device_type)


# Beneath functions that torch.compile takes for constant: it would trace through the cache itself.
@functools.cache
def _tried(device_type: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton does not run on '{device_type}' (with TRITON_INTERPRET=1 it does, slowly)"
    from anymixer_kernels.triton_probe import probe

    try:
        probe(device_type)
    except Exception as error:  # whatever a compiler, a driver or a file system may raise: named in a warning
        return f"Triton cannot compile here ({type(error).__name__}: {error})"
    return None


@torch.compiler.assume_constant_result
def _announce(op: str, problem: str | None) -> bool:
    """Say once per op and reason which form runs; True for Triton."""
    return _announced(op, problem)


@functools.cache
def _announced(op: str, problem: str | None) -> bool:
    if problem is None:
        _log.info("%s: triton", op)
    else:
        _log.warning("%s: the PyTorch form runs on the GPU, because %s", op, problem)
    return problem is None
