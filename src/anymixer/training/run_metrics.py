"""What a run was like, step by step: reads `metrics.jsonl`, which lies beside the checkpoints, and sums it up.

One line a step, {"step", "tokens", "loss", "seconds", "data_seconds", "memory_bytes"}, and one an evaluation of a
stream, {"step", "stream", "eval_loss", "eval_accuracy"}. tokens: real ones read so far, by all ranks. seconds: from
asking for the batch to the end of the step; evaluations and checkpoints are not in it. data_seconds: of these, until
the batch was there. memory_bytes: the most that rank 0 has held so far, allocated on its GPU (without what recordings
of CUDA graphs keep for their next pass), or resident in its process on a CPU.
"""

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

METRICS_NAME = "metrics.jsonl"
# Steps at the start of a run that its speed leaves out: compiling, allocating, starting workers.
WARM_UP_STEPS = 5
_TAIL_BYTES = 4096


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line that a kill cut off is left out."""
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line) for line in whole]


def summarize(lines: Sequence[dict[str, Any]]) -> dict[str, float | int | None]:
    """Last training loss, tokens read, tokens per second (the median step's, after the warm-up), the median share of
    a step's time that it waited for its batch, peak memory."""
    steps = [line for line in lines if "seconds" in line]
    timed = steps[min(WARM_UP_STEPS, len(steps) // 2) :]
    before = {1: 0} | {line["step"] + 1: line["tokens"] for line in steps}
    rates = [(line["tokens"] - before[line["step"]]) / line["seconds"] for line in timed if line["step"] in before]
    waits = [line["data_seconds"] / line["seconds"] for line in timed if "data_seconds" in line]
    return {
        "train_loss": steps[-1]["loss"] if steps else None,
        "tokens": steps[-1]["tokens"] if steps else 0,
        "tokens_per_second": statistics.median(rates) if rates else None,
        "data_wait_share": statistics.median(waits) if waits else None,
        "peak_memory_bytes": max((line["memory_bytes"] for line in steps), default=None),
    }


def evaluation(lines: Sequence[dict[str, Any]], step: int) -> dict[str, Any] | None:
    """Loss and accuracy of held-out text after `step` steps, where they were measured.

    With several streams: their mean, each stream counting once, and `streams` with the figures of each.
    """
    measured = [line for line in lines if line["step"] == step and "eval_loss" in line]
    if not measured:
        return None
    streams = {line["stream"]: {key: line[f"eval_{key}"] for key in ("loss", "accuracy")} for line in measured}
    mean: dict[str, Any] = {
        key: sum(figures[key] for figures in streams.values()) / len(streams) for key in ("loss", "accuracy")
    }
    return mean if len(streams) == 1 else mean | {"streams": streams}


def last_step(path: Path) -> dict[str, Any] | None:
    """The last step of a `metrics.jsonl` that may be growing, without reading all of it; None before the first."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        tail = file.read().decode(encoding="utf-8", errors="replace")
    for line in reversed(tail.splitlines(keepends=True)):
        if line.startswith("{") and line.endswith("}\n") and "seconds" in (read := json.loads(line)):
            return read
    return None
