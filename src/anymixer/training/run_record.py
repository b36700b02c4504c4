"""Writes a run's `metrics.jsonl` while it trains (see `run_metrics` for what it holds)."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from anymixer.files import write_text_atomic
from anymixer.training.evaluation import METRICS
from anymixer.training.run_metrics import METRICS_NAME, read_metrics


class RunRecord(Callback):
    """Keep the lines in memory, and on rank 0 in `folder` too, where there is one.

    A resumed run continues the file: what was written after the checkpoint that it starts from, and a line
    that was cut off, go; so every step stands there once.
    """

    def __init__(self, folder: Path | None) -> None:
        self.path = folder / METRICS_NAME if folder is not None and dist.get_global_rank() == 0 else None
        self.lines: list[dict[str, Any]] = []
        self._started = 0.0
        self._waited = 0.0

    def after_load(self, state: State, logger: Logger) -> None:
        """Take up the record where the checkpoint stands."""
        step = int(state.timestamp.batch)
        if self.path is not None and self.path.exists():
            self.lines = [line for line in read_metrics(self.path) if line["step"] <= step] if step else []
            write_text_atomic(self.path, "".join(map(_text, self.lines)))

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """Start the clock of a step."""
        self._started = time.perf_counter()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Stop the clock of the wait for the batch."""
        self._waited = time.perf_counter() - self._started

    def batch_end(self, state: State, logger: Logger) -> None:
        """Write down the step that ended; Composer has waited for its loss."""
        loss = (state.total_loss_dict or {}).get("loss/train/total")
        self._add(
            {
                "step": int(state.timestamp.batch),
                "tokens": int(state.timestamp.token),
                "loss": None if loss is None else float(loss),
                "seconds": round(time.perf_counter() - self._started, 6),
                "data_seconds": round(self._waited, 6),
                "memory_bytes": peak_memory_bytes(),
            }
        )

    def eval_end(self, state: State, logger: Logger) -> None:
        """Write down the evaluation of one stream, unless a run that is repeated had written it."""
        step, stream = int(state.timestamp.batch), str(state.dataloader_label)
        if any(line["step"] == step and line.get("stream") == stream for line in self.lines):
            return
        values: dict[str, Any] = state.eval_metric_values
        figures = {f"eval_{ours}": float(values[theirs]) for theirs, ours in METRICS.items() if theirs in values}
        self._add({"step": step, "stream": stream, **figures})

    def _add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(_text(line))


def peak_memory_bytes() -> int:
    """The most this process has held so far: allocated on its GPU, else resident in main memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _text(line: dict[str, Any]) -> str:
    return json.dumps(line) + "\n"
