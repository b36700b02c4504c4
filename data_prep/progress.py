"""Shows how far a conversion is: a bar on a terminal, a line a minute in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

_LOG_SECONDS = 60.0


class ProgressDisplay:
    """Context that shows the documents, tokens and bytes done so far, their rates and the time left.

    Args:
        what: what is being done.
        total: bytes to read; `done` of them were read before this start.
    """

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self._what = what
        self._total = total
        self._before = done
        self._bar: Any = None
        self._counts = (0, 0, 0)

    def __enter__(self) -> ProgressDisplay:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

        self._start = self._logged = time.monotonic()
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), TaskProgressColumn())
            self._bar = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._what, total=self._total, completed=self._before)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, documents: int, tokens: int, position: int) -> None:
        """Show the totals of this start."""
        if self._bar is not None:
            line = self._line(documents, tokens, position)
            self._bar.update(self._task, completed=self._before + position, description=line)
        elif time.monotonic() - self._logged >= _LOG_SECONDS:
            self._logged = time.monotonic()
            share = (self._before + position) / self._total
            print(f"{share:6.1%}  {self._line(documents, tokens, position)}", file=sys.stderr, flush=True)

    def _line(self, documents: int, tokens: int, position: int) -> str:
        seconds = max(time.monotonic() - self._start, 1e-3)
        parts = [self._what, f"{documents:,} documents", f"{documents / seconds:,.0f}/s"]
        if tokens:
            parts.append(f"{tokens / seconds:,.0f} tokens/s")
        if position:
            left = (self._total - self._before - position) / position * seconds
            parts.append(f"{_clock(max(left, 0.0))} left")
        return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
