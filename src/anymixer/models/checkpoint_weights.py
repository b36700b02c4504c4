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

# What a Composer checkpoint holds besides tensors and plain containers; none of these can act when read.
HARMLESS_TYPES: list[Any] = [
    np.ndarray,
    np.dtype,
    np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    datetime.timedelta,
    TorchVersion,
    *(type(np.dtype(code)) for code in ("uint32", "int64", "float64", "uint8", "bool")),
]


def read_checkpoint(path: str | Path, key: str) -> dict[str, Any]:
    """Everything in a `.pt` file, on the CPU. Raises UserError naming `key` for a file that is missing,
    broken, or holds anything but tensors and harmless plain types (it is then not opened any further)."""
    if not Path(path).is_file():
        raise UserError(f"{key}: no such file: {path}")
    try:
        with torch.serialization.safe_globals(HARMLESS_TYPES):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        what = next((line for line in str(error).splitlines() if "GLOBAL" in line), "not only tensors")
        raise UserError(f"{key}: {path} is refused: it holds more than tensors ({what.strip()[:160]})") from error
    except (RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{key}: {path} is not a whole checkpoint: {str(error).splitlines()[0][:160]}") from error


def model_weights(checkpoint: Mapping[str, Any], key: str) -> dict[str, Tensor]:
    """The model's state dict inside a Composer checkpoint (`state.model`, names behind `model.`) or a flat one."""
    state = checkpoint.get("state", checkpoint)
    state = state.get("model", state) if isinstance(state, Mapping) else {}
    weights = {name.removeprefix("model."): value for name, value in state.items() if isinstance(value, Tensor)}
    if not weights:
        raise UserError(f"{key}: the file holds no model weights")
    return weights


def load_checkpoint_weights(model: nn.Module, path: str | Path, key: str) -> None:
    """Fill every parameter of `model` from the checkpoint; UserError lists names or shapes that do not fit."""
    weights = model_weights(read_checkpoint(path, key), key)
    own = model.state_dict()
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [n for n in own.keys() & weights.keys() if own[n].shape != weights[n].shape]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unexpected", extra), ("of another shape", sorted(shapes)))
        if names
    ]
    if problems:
        raise UserError(f"{key}: {path} does not fit the model: {'; '.join(problems)}")
    model.load_state_dict(weights)
