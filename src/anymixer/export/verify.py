"""Compares exported folders, loaded in a process that does not have this package, with the models they are of."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from anymixer.errors import UserError
from anymixer.export.fresh_process import outputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-5
_SCRIPT = Path(__file__).with_name("fresh_process.py")


@dataclass
class Expected:
    """What an exported folder has to give.

    model: what was exported, in evaluation mode. auto_class: the name in transformers that loads it. rows: token ids.
    texts: with `text_ids`, their ids by the model's tokenizer; both empty for a model without one.
    """

    folder: Path
    model: "PreTrainedModel"
    auto_class: str
    rows: list[list[int]]
    texts: list[str] = field(default_factory=list)
    text_ids: list[list[int]] = field(default_factory=list)


@dataclass
class Verdict:
    """difference: the largest of any output, in absolute terms. problem: why the folder cannot be given to anybody,
    in one line, or None."""

    difference: float
    problem: str | None


def verify(expected: Sequence[Expected], blocked: Sequence[str]) -> list[Verdict]:
    """Load the folders in one fresh process, elsewhere, and compare. blocked: packages that it must do without.

    Raises UserError where the process ends early, for want of memory or disk.
    """
    with tempfile.TemporaryDirectory(prefix="anymixer-verify-") as temporary:
        request, answer = Path(temporary, "request.json"), Path(temporary, "answer.safetensors")
        asked = [
            {"folder": str(e.folder.resolve()), "auto_class": e.auto_class, "rows": e.rows, "texts": e.texts}
            for e in expected
        ]
        request.write_text(json.dumps({"blocked": list(blocked), "folders": asked}), encoding="utf-8")
        done = subprocess.run(
            # -B: Python tells compiled files apart by size and second, and transformers 4 has one place for all folders
            # of a name.
            [sys.executable, "-IB", str(_SCRIPT), str(request), str(answer)],
            cwd=temporary,
            env=_environment(temporary),
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
            what = f"the process that verifies, in {tempfile.gettempdir()} (TMPDIR), ended with {done.returncode}"
            raise UserError(f"{what}, so nothing is exported: {reason}")
        return _verdicts(expected, answer)


def _environment(temporary: str) -> dict[str, str]:
    """This process's environment, less what leads to our own files; nothing is fetched or left behind."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    elsewhere = {"HF_MODULES_CACHE": str(Path(temporary, "modules")), "HF_HUB_OFFLINE": "1"}
    return {**kept, **elsewhere, "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}


def _verdicts(expected: Sequence[Expected], answer: Path) -> list[Verdict]:
    from safetensors import safe_open

    with safe_open(answer, "pt") as file:
        notes = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    verdicts = []
    for number, one in enumerate(expected):
        found = [tensors[f"{number}.{place}"] for place in range(len(tensors)) if f"{number}.{place}" in tensors]
        verdicts.append(_verdict(one, found, json.loads(notes[str(number)])))
    return verdicts


def _verdict(expected: Expected, found: list[Tensor], notes: dict[str, Any]) -> Verdict:
    if notes["error"] is not None:
        return Verdict(float("nan"), f"cannot be loaded without anymixer: {' '.join(notes['error'].split())[:300]}")
    own = outputs(expected.model, expected.rows)
    if [tuple(t.shape) for t in own] != [tuple(t.shape) for t in found]:
        shapes = f"{[tuple(t.shape) for t in found]} where the model gives {[tuple(t.shape) for t in own]}"
        return Verdict(float("nan"), f"outputs of the shapes {shapes}")
    difference = max(_difference(a, b) for a, b in zip(own, found))
    problem = None
    if notes["wrong"]:
        problem = "; ".join(f"{key.replace('_', ' ')}: {', '.join(names[:3])}" for key, names in notes["wrong"].items())
    elif notes["ids"] != expected.text_ids:
        problem = "its tokenizer gives other ids"
    elif not difference <= TOLERANCE:  # NaN is no agreement
        problem = f"its logits differ by {difference:.2g}, more than {TOLERANCE:g}"
    return Verdict(difference, problem)


def _difference(own: Tensor, found: Tensor) -> float:
    return float((own.float() - found.float()).abs().max()) if own.numel() else 0.0
