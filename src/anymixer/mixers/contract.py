"""What every mixer owes, checked on one: for the author of a mixer that lies outside the package.

anymixer mixers --module my_mixer.py --check
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from anymixer.layers.packing import make_packing
from anymixer.mixers.base import SequenceMixer, build_mixer

_LENGTH = 23
Check = Callable[[SequenceMixer, int], str | None]


def check_contract(spec: Mapping[str, Any] | str, d_model: int = 64) -> dict[str, str | None]:
    """Build the mixer that `spec` describes, on the CPU, and return for each promise what breaks it, or None.

    Raises UserError when it cannot be built. What the mixer itself raises is part of the answer.
    """
    promises: dict[str, Check] = {
        "the output has the input's shape": _shape,
        "every parameter gets a finite gradient": _gradients,
        "forward == output(matrix @ values)": _matrix_form,
        "padding changes nothing": _padding,
        "neighbours in a packed row change nothing": _packing,
        "bfloat16 is within 2e-2 of float32": _bfloat16,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {promise: _run(check, build_mixer(spec, d_model).eval(), d_model) for promise, check in promises.items()}


def _run(check: Check, mixer: SequenceMixer, d_model: int) -> str | None:
    try:
        return check(mixer, d_model)
    except Exception as error:  # whatever a user's mixer raises is what its author wants to read
        return " ".join(f"{type(error).__name__}: {error}".split())


def _shape(mixer: SequenceMixer, d_model: int) -> str | None:
    for length in (1, 2, _LENGTH):
        shape = tuple(mixer(torch.randn(2, length, d_model)).shape)
        if shape != (2, length, d_model):
            return f"{shape} for {(2, length, d_model)}"
    return None


def _gradients(mixer: SequenceMixer, d_model: int) -> str | None:
    mixer(torch.randn(2, _LENGTH, d_model)).square().sum().backward()
    for name, parameter in mixer.named_parameters():
        if parameter.grad is None:
            return f"{name} gets none"
        if not parameter.grad.isfinite().all():
            return f"{name}'s is not finite"
    return None


def _matrix_form(mixer: SequenceMixer, d_model: int) -> str | None:
    mixer, hidden = mixer.double(), torch.randn(2, _LENGTH, d_model, dtype=torch.float64)
    packing = make_packing(None, torch.tensor([[0] * _LENGTH, [0] * 5 + [1] * (_LENGTH - 5)]))
    for p in (None, packing):
        dense = mixer.output(mixer.matrix(hidden, p) @ mixer.values(hidden, p), hidden, p)
        if wrong := _differ(mixer(hidden, p), dense, 1e-8):
            return wrong + (" with packing" if p else "")
    return None


def _padding(mixer: SequenceMixer, d_model: int) -> str | None:
    alone = torch.randn(1, _LENGTH, d_model)
    for left, right in ((0, 7), (4, 3)):
        row = torch.cat([100 * torch.randn(1, left, d_model), alone, 100 * torch.randn(1, right, d_model)], dim=1)
        mask = torch.tensor([[0] * left + [1] * _LENGTH + [0] * right])
        padded = mixer(row, make_packing(mask, None))[:, left : left + _LENGTH]
        if wrong := _differ(padded, mixer(alone), 1e-4):
            return f"{wrong} with {left} before and {right} behind"
    return None


def _packing(mixer: SequenceMixer, d_model: int) -> str | None:
    lengths = (_LENGTH, 1, 9)
    pieces = [torch.randn(1, length, d_model) for length in lengths]
    ids = torch.tensor([[i for i, length in enumerate(lengths) for _ in range(length)]])
    packed = mixer(torch.cat(pieces, dim=1), make_packing(None, ids)).split(lengths, dim=1)
    for number, (piece, together) in enumerate(zip(pieces, packed), 1):
        if wrong := _differ(together, mixer(piece), 1e-4):
            return f"{wrong} in sequence {number} of {len(lengths)}"
    return None


def _bfloat16(mixer: SequenceMixer, d_model: int) -> str | None:
    hidden = torch.randn(2, _LENGTH, d_model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = mixer(hidden)
    return _differ(low.float(), mixer(hidden), 2e-2)


def _differ(actual: Tensor, expected: Tensor, tolerance: float) -> str | None:
    """The relative error in words, when the norm of the difference is above `tolerance`."""
    error = float(((actual - expected).norm() / expected.norm().clamp(min=1e-30)).detach())
    return None if error <= tolerance else f"a relative error of {error:.1e}"
