"""Reads model weights out of checkpoint files without running anything a file might hold."""

import datetime
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from anymixer.errors import UserError

_INTEGERS = ("int8", "int16", "int32", "int64")
_DTYPES = ("bool", *_INTEGERS, *(f"u{name}" for name in _INTEGERS), "float16", "float32", "float64")
_rebuild_array = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
# What a Composer checkpoint holds besides tensors and plain containers; none of these can act when read.
HARMLESS_TYPES: list[Any] = [
    np.ndarray,
    np.dtype,
    _rebuild_array,
    (_rebuild_array, "numpy.core.multiarray._reconstruct"),  # its name in files written with NumPy 1
    datetime.timedelta,
    TorchVersion,
    *(type(np.dtype(code)) for code in _DTYPES),
]


class RefusedCheckpoint(UserError):
    """A checkpoint that holds more than tensors and harmless types: reading it could run code."""


def read_checkpoint(path: str | Path, key: str, *, mmap: bool = False) -> dict[str, Any]:
    """Everything in a `.pt` file, or in a folder of shards (where of the tensors only the model's), on the CPU.

    mmap: leave a file's tensors on disk until they are used. Raises UserError naming `key` for a checkpoint that is
    missing or broken, and RefusedCheckpoint for one that holds anything but tensors and harmless plain types: it is
    then not opened any further.
    """
    path = Path(path)
    if path.is_dir():
        from anymixer.models.checkpoint_shards import read_shards

        return read_shards(path, key)
    if not path.is_file():
        raise UserError(f"{key}: no such file: {path}")
    try:
        content = read_harmless(path, key, str(path), mmap=mmap)
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{key}: {path} is not a whole checkpoint: {str(error).splitlines()[0][:160]}") from error
    if not isinstance(content, dict):
        raise UserError(f"{key}: {path} is no checkpoint: it holds a {type(content).__name__}, not names and tensors")
    return content


def read_harmless(file: Any, key: str, name: str, *, mmap: bool = False) -> Any:
    """What `torch.save` wrote to a path or binary stream, called `name` in messages.

    Raises RefusedCheckpoint for anything but tensors and harmless types; torch's own errors for a broken file.
    """
    try:
        with torch.serialization.safe_globals(HARMLESS_TYPES):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        found = next((line for line in str(error).splitlines() if "GLOBAL" in line), None)
        why = "it is no checkpoint, or" if found is None else "it"
        what = "" if found is None else f" ({found.strip()[:160]})"
        raise RefusedCheckpoint(f"{key}: {name} is refused: {why} holds more than tensors{what}") from error


def model_weights(checkpoint: Mapping[str, Any], key: str) -> dict[str, Tensor]:
    """The model's state dict inside a Composer checkpoint (`state.model`, names behind `model.`) or a flat one.

    In a flat one, `model.` is in front of all names or part of some.
    """
    state = checkpoint.get("state", checkpoint)
    nested = isinstance(state, Mapping) and isinstance(state.get("model"), Mapping)
    state = state["model"] if nested else state if isinstance(state, Mapping) else {}
    weights = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not weights:
        raise UserError(f"{key}: the file holds no model weights")
    if nested or all(name.startswith("model.") for name in weights):
        weights = {name.removeprefix("model."): value for name, value in weights.items()}
    return weights


def load_checkpoint_weights(model: nn.Module, path: str | Path, key: str) -> None:
    """Fill every parameter of `model` from the checkpoint; UserError lists names or shapes that do not fit."""
    weights = model_weights(read_checkpoint(path, key), key)
    if problems := misfits(model.state_dict(), weights):
        raise UserError(f"{key}: {path} does not fit the model: {problems}")
    model.load_state_dict(weights)


def misfits(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """In words, the names and shapes of `weights` that are not those of a model's `own`; "" when all fit."""
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [n for n in sorted(own.keys() & weights.keys()) if own[n].shape != weights[n].shape]
    named = [f"{n}: {list(weights[n].shape)} for the model's {list(own[n].shape)}" for n in shapes]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unexpected", extra), ("of another shape", named))
        if names
    ]
    return "; ".join(problems)
