"""What this process's main thread is doing, in words: read off its Python stack by another thread.

Asking costs the training loop nothing, needs no hook in anybody's code, and is right where it matters most: in a
call that never returns.
"""

import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

_COLLECTIVES = "torch/distributed/distributed_c10d.py"
_TRAINER = "composer/trainer/trainer.py"
SAVING = "writing or reading a checkpoint"
# End of a file's path, function or None for all of them, what it does. The innermost frame that is known counts.
_KNOWN: tuple[tuple[str, str | None, str], ...] = (
    ("torch/utils/data/dataloader.py", None, "waiting for a batch from the data loader"),
    ("torch/autograd/graph.py", "_engine_run_backward", "backward and its exchange of gradients"),
    ("torch/_dynamo/convert_frame.py", None, "compiling"),
    ("triton/compiler/compiler.py", None, "compiling"),
    ("composer/utils/checkpoint.py", None, SAVING),
    ("composer/utils/remote_uploader.py", None, SAVING),
    ("composer/callbacks/checkpoint_saver.py", None, SAVING),
    ("torch/optim/optimizer.py", None, "the optimizer's step"),
    (_TRAINER, "_eval_loop", "evaluating"),
    (_TRAINER, "_train_microbatch", "forward"),
    (_TRAINER, "__init__", "making the trainer"),
)


@dataclass(frozen=True)
class Whereabouts:
    """words: what it does or waits for. place: FILE:LINE of the innermost Python frame. waits: whether the words
    say that it waits for other ranks (or for its GPU, which does)."""

    words: str
    place: str
    waits: bool = False

    def __str__(self) -> str:
        return f"{self.words} ({self.place})"


def main_thread() -> Whereabouts:
    """Where the main thread of this process is now."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return describe(frame) if frame is not None else Whereabouts("ending", "-")


def where_raised(error: BaseException) -> Whereabouts | None:
    """Where the code was that an exception ended; None for one that was never raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return None if trace is None else describe(trace.tb_frame)


def describe(innermost: FrameType) -> Whereabouts:
    """Put a stack into words."""
    place = f"{Path(innermost.f_code.co_filename).name}:{innermost.f_lineno}"
    for frame in _outwards(innermost):
        file, function = frame.f_code.co_filename.replace("\\", "/"), frame.f_code.co_name
        if file.endswith(_COLLECTIVES):
            return Whereabouts(f"waiting for the other ranks, in {function}", place, waits=True)
        if file.endswith(_TRAINER) and frame is innermost:
            # A call without Python code of its own: `.item()`, after a collective that was only put in the GPU's queue.
            return Whereabouts("waiting for its device, and so for the other ranks", place, waits=True)
        for end, name, words in _KNOWN:
            if file.endswith(end) and name in (None, function):
                return Whereabouts(words, place)
    return Whereabouts("its own work", place)


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
