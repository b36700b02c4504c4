"""main.py with one callback more, which writes down where the time of the last steps went; started by scaling.py.

composer -n 2 benchmarks/scaling_rank.py PROFILE.json PROFILED_STEPS FILE.yaml key=value
"""

import importlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch.profiler import ProfilerActivity, profile

Interval = tuple[float, float]


class Communication(Callback):
    """Profile rank 0 in the last `steps` steps: the share of their time that ranks exchange, and that nothing else
    happens meanwhile."""

    def __init__(self, path: str, steps: int) -> None:
        self.path, self.steps = Path(path), steps
        self.profiler: profile | None = None

    def batch_end(self, state: State, logger: Logger) -> None:
        """Begin at the end of the step before the first of them, end with the last."""
        if dist.get_global_rank() != 0 or state.max_duration is None:
            return
        left = state.max_duration.value - int(state.timestamp.batch)
        if left == self.steps:
            # Recording the host's work too would slow this rank alone, and so hide its waits for the others.
            activity = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
            self.profiler = profile(activities=[activity])
            self.profiler.start()
        elif left == 0 and self.profiler is not None:
            self.profiler.stop()
            shares = communication_shares(self.profiler.events() or [], cuda=torch.cuda.is_available())
            self.path.write_text(json.dumps(shares))


def communication_shares(events: Iterable[Any], *, cuda: bool) -> dict[str, float | None]:
    """`exchanging`: the share of the profiled time in which a collective ran; `alone`: and nothing else on the device.

    On a GPU these are NCCL's kernels, beside all other kernels and copies. On a CPU they are gloo's operations, which
    run in threads of their own; what runs beside them is not told apart.
    """
    device = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    exchange, other = [], []
    for event in events:
        # A GPU's annotation is a label over its work, as of a step or of what FSDP exchanges, and not work itself.
        if event.device_type == device and not (cuda and event.is_user_annotation):
            kept = exchange if ("nccl" if cuda else "gloo:") in event.name.lower() else other
            kept.append((event.time_range.start, event.time_range.end))
    everything = union([*exchange, *other])
    if not everything:
        return {"exchanging": None, "alone": None}
    span = everything[-1][1] - everything[0][0]
    alone = length(everything) - length(union(other))
    return {"exchanging": length(union(exchange)) / span, "alone": alone / span if cuda else None}


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same stretches of time, sorted, none touching another."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def length(intervals: Iterable[Interval]) -> float:
    """Of stretches that do not touch."""
    return sum(end - start for start, end in intervals)


def main() -> int:
    """Add the callback to the table, and do what main.py does."""
    from anymixer.entry_point import run
    from anymixer.training.callbacks import CALLBACKS

    sys.path.insert(0, str(Path(__file__).parents[1]))
    pretrain = importlib.import_module("main").main

    path, steps, *arguments = sys.argv[1:]
    CALLBACKS.factories["communication"] = f"{__name__}:Communication"  # type: ignore[index]
    place = os.path.abspath(path)
    return run(pretrain, [*arguments, f"callbacks.communication={{path: '{place}', steps: {steps}}}"])


if __name__ == "__main__":
    sys.exit(main())
