"""Which implementation of an op runs.

`auto` (the default) is the fastest form for the input's device: `triton` on a GPU, `torch` elsewhere. `triton` is the
fused form, `torch` the fast pure-PyTorch form, and `reference` the slow, literal one that defines what is correct.
`mamba_ssm` is the mamba-ssm package's scan for the ops that it has, and `auto` for the others.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from anymixer_kernels.mamba_ssm_scan import import_problem

BACKENDS = ("auto", "triton", "torch", "reference", "mamba_ssm")

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


def takes_triton(tensor: Tensor, op: str, unsupported: str | None = None, slower: str | None = None) -> bool:
    """Whether `op` runs its Triton form on inputs like `tensor`.

    unsupported: what the call asks for that the Triton form does not have; None where it has all. slower: for what
    inputs, these among them, PyTorch's form is the better choice, which stands where `triton` is forced; None
    elsewhere. What keeps a GPU from Triton is logged once. Raises RuntimeError where `triton` is forced and cannot run.
    """
    if _forced not in ("auto", "triton", "mamba_ssm") or (_forced != "triton" and not tensor.is_cuda):
        return False
    if unsupported is None and tensor.dtype == torch.float64:
        unsupported = "float64"
    problem = triton_problem(tensor.device.type)
    if problem is None and unsupported is not None:
        problem = f"it has no form for {unsupported}"
    if problem is not None and _forced == "triton":
        raise RuntimeError(f"{op}: the triton backend was asked for, but {problem}")
    return _announce(op, "triton", problem, slower)


def runs_without_triton(tensor: Tensor, op: str) -> None:
    """Say once that `op`, which has no Triton form yet, runs PyTorch's where Triton's is asked for or expected."""
    if _forced == "triton" or (_forced in ("auto", "mamba_ssm") and tensor.is_cuda):
        _announce(op, "torch", "it has no Triton form yet")


def takes_mamba_ssm(tensor: Tensor, op: str, unsupported: str | None = None) -> bool:
    """Whether `op` runs by mamba-ssm's scan: only where that is forced.

    unsupported: as in `takes_triton`. Raises RuntimeError where it is forced and cannot run.
    """
    if _forced != "mamba_ssm":
        return False
    if unsupported is None and tensor.dtype == torch.float64:
        unsupported = "float64"
    # Its offsets have 32 bits, and Hydra gives it both directions in one batch.
    if unsupported is None and tensor.numel() >= 2**30:
        unsupported = "2^30 entries and more"
    problem = mamba_ssm_problem(tensor.device.type)
    if problem is None and unsupported is not None:
        problem = f"it has no form for {unsupported}"
    if problem is not None:
        raise RuntimeError(f"{op}: the mamba_ssm backend was asked for, but {problem}")
    return _announce(op, "mamba_ssm", None)


@torch.compiler.assume_constant_result
def mamba_ssm_problem(device_type: str) -> str | None:
    """Why mamba-ssm's scan cannot run on a kind of device, or None where it can."""
    if device_type != "cuda":
        return f"mamba-ssm does not run on '{device_type}'"
    return import_problem()


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
def _announce(op: str, form: str, problem: str | None, slower: str | None = None) -> bool:
    """Say once per op and reason which form runs; True for `form`, False for PyTorch's."""
    return _announced(op, form, problem, slower)


@functools.cache
def _announced(op: str, form: str, problem: str | None, slower: str | None) -> bool:
    if problem is not None:
        _log.warning("%s: the PyTorch form runs, because %s", op, problem)
    elif slower is not None:
        _log.info("%s: torch, which is faster for %s", op, slower)
    else:
        _log.info("%s: %s", op, form)
    return problem is None and slower is None
