"""Writes a model as ONNX, with any batch size and length, and checks it with onnxruntime."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anymixer.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ONNX_NAME = "model.onnx"
OPSET = 18
TOLERANCE = 1e-4


class _Positional(nn.Module):
    """The model as a function of two tensors that returns its tensors."""

    def __init__(self, model: "PreTrainedModel") -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """[batch, length] twice -> logits, or whatever tensors the model's head gives."""
        output = self.model(input_ids=input_ids, attention_mask=attention_mask).to_tuple()
        tensors = tuple(value for value in output if isinstance(value, Tensor))
        return tensors[0] if len(tensors) == 1 else tensors


def write_onnx(model: "PreTrainedModel", file: Path, rows: list[list[int]]) -> float:
    """Write `model` to `file` and compare what onnxruntime computes with it; returns the largest difference.

    rows: token ids. Inputs: input_ids and attention_mask, int64 [batch, length]. Raises UserError, saying why, where
    ONNX cannot express the model, or its outputs differ by more than TOLERANCE.
    """
    _check_installed()
    _export(model, file)
    difference = max(_difference(model, file, batch) for batch in (rows, rows[:1], rows[-1:]))
    if not difference <= TOLERANCE:
        raise UserError(f"--onnx: onnxruntime's outputs differ by {difference:.2g}, more than {TOLERANCE:g}")
    return difference


def _check_installed() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(package)
        except ImportError as error:
            raise UserError(f"--onnx: needs {package}: pip install 'anymixer[onnx]'") from error


def _export(model: "PreTrainedModel", file: Path) -> None:
    from anymixer_kernels import force_backend

    ids = torch.ones(2, 16, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    axes: Any = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        # The references have no branches on the length, which would fix it.
        with torch.no_grad(), force_backend("reference"), _quiet():
            traced = torch.export.export(_Positional(model), (ids, mask), dynamic_shapes=[axes, axes], strict=False)
            program: Any = torch.onnx.export(
                traced.run_decompositions(_in_other_words()),
                (),
                input_names=["input_ids", "attention_mask"],
                opset_version=OPSET,
                dynamo=True,
            )
            program.save(file)
    except Exception as error:  # torch's exporter raises whatever its passes raise
        raise UserError(f"--onnx: this model cannot be written as ONNX: {_reason(error)}") from error


def _in_other_words() -> dict[Any, Any]:
    """What to put in the place of operations that torch cannot translate."""
    aten: Any = torch.ops.aten
    return {aten.cummax.default: _running_maximum, aten.remainder.Scalar: _remainder}


def _remainder(x: Tensor, divisor: Any) -> Tensor:
    """x % divisor, where the divisor may be the length."""
    return torch.remainder(x, torch.full((), divisor, dtype=x.dtype, device=x.device))


def _running_maximum(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """cummax of [batch, length] over the length, for which ONNX has no operator; the places are not given."""
    assert x.dim() == 2 and dim in (1, -1)
    place = torch.arange(x.shape[1], device=x.device)
    values = torch.where(place[:, None] >= place, x[:, None, :], x[:, :1, None]).amax(-1)
    return values, torch.zeros_like(values)


def _reason(error: BaseException) -> str:
    """The first line of the error at the bottom."""
    while error.__cause__ is not None:
        error = error.__cause__
    if "Constraints violated" in str(error):
        return "it takes as many steps as there are tokens, which would fix the length"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what torch's exporter prints of its passes off the screen."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _difference(model: "PreTrainedModel", file: Path, rows: list[list[int]]) -> float:
    """The largest difference at real tokens of `rows`, padded to the longest."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    found = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    with torch.no_grad():
        own = _Positional(model)(ids, mask)
    own = own if isinstance(own, tuple) else (own,)
    return max(_apart(a, torch.from_numpy(b), mask.bool()) for a, b in zip(own, found))


def _apart(own: Tensor, found: Tensor, real: Tensor) -> float:
    apart = (own - found).abs()
    return float((apart[real] if own.shape[:2] == real.shape else apart).max())
