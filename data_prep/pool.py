"""Processes that share the units of a conversion, each working on one at a time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait as wait_for_any
from typing import Any

from anymixer.errors import UserError
from data_prep.progress import ProgressDisplay
from data_prep.unit_work import Job
from data_prep.units import Unit

_POLL_SECONDS = 0.2
_NUMBERS = 3  # documents, tokens, bytes

# glibc gives large blocks back to the system as soon as they are free, and the pages of the next ones are cleared anew:
# 4 % of the time of tokenizing books. Up to this size, blocks are kept.
_MEMORY = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(1 << 30))

Work = Callable[[Job, Unit, Any], None]


class Stopped(Exception):
    """Another process failed, or the user pressed Ctrl-C: leave this unit unfinished."""


class _Alone:
    """The watch of the only process: shows its progress itself."""

    def __init__(self, display: ProgressDisplay, cores: int) -> None:
        self._display = display
        self._cores = cores
        self._documents = self._tokens = self._before = self._position = 0

    def next_unit(self, size: int) -> None:
        self._before += size
        self._position = 0

    def count(self, documents: int, tokens: int, position: int) -> None:
        self._documents += documents
        self._tokens += tokens
        self._display.show(self._documents, self._tokens, self._before + position)

    def has_idle_cores(self) -> bool:
        return self._cores > 1


class _Member:
    """The watch of one process of several: adds to its own numbers on a board that the parent reads."""

    def __init__(self, board: Any, slot: int, busy: Any, stop: Any, cores: int) -> None:
        self._board = board
        self._first = slot * _NUMBERS
        self._busy = busy
        self._stop = stop
        self._cores = cores
        self._before = 0

    def count(self, documents: int, tokens: int, position: int) -> None:
        if self._stop.value:
            raise Stopped
        self._board[self._first] += documents
        self._board[self._first + 1] += tokens
        self._board[self._first + 2] = self._before + position

    def has_idle_cores(self) -> bool:
        return self._busy.value < self._cores

    def run(self, work: Work, job: Job, unit: Unit) -> None:
        if self._stop.value:
            raise Stopped
        with self._busy.get_lock():
            self._busy.value += 1
        try:
            work(job, unit, self)
        finally:
            with self._busy.get_lock():
                self._busy.value -= 1
        self._before += unit.bytes
        self._board[self._first + 2] = self._before


_member: _Member  # of this process, once it has joined


def prepare_processes(units: int, cores: int) -> None:
    """Begin to import what the processes of `run_units` need, where there will be several, and return at once."""
    if min(cores, units) > 1:
        # Not forked from this process, whose libraries may have started threads; each new process is forked from
        # one that has done nothing but import.
        forkserver.set_forkserver_preload(["data_prep.unit_work", "data_prep.shards", "tokenizers"])
        # Ctrl-C is for this process, which says when the others stop: they begin with it blocked. The tracker, were it
        # to start as the server does, would unblock it.
        resource_tracker.ensure_running()
        with _interrupts_held(), _environment(**_MEMORY):
            forkserver.ensure_running()


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Let programs that start in the block find these variables, where the user has not set them."""
    variables = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let Ctrl-C wait for the end of the block, and block it in programs that start there."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    came: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    # The mask is this thread's; where another takes the signal, the main one still runs its handler.
    handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number)) if is_main else None
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def _nothing() -> None:
    """What the first process does."""


def run_units(work: Work, job: Job, units: Sequence[Unit], cores: int, display: ProgressDisplay) -> None:
    """Call `work(job, unit, watch)` for every unit, several at a time.

    Where units are fewer than cores, the tokenizer uses the idle ones.

    Raises:
        UserError: of the first unit that failed; the others under way are left unfinished.
    """
    # The tokenizers library makes its threads once, when it first uses several.
    os.environ["RAYON_NUM_THREADS"] = str(cores)
    if min(cores, len(units)) > 1:
        _run_in_processes(work, job, units, cores, display)
        return
    watch = _Alone(display, cores)
    for unit in units:
        work(job, unit, watch)
        watch.next_unit(unit.bytes)


def _processes(units: int, cores: int) -> int:
    """How many work at a time. A few units more than cores would leave cores idle at the end: they share them then, two
    more at most, because each takes memory."""
    return min(units, cores + 2) if units < 2 * cores else cores


def _run_in_processes(work: Work, job: Job, units: Sequence[Unit], cores: int, display: ProgressDisplay) -> None:
    prepare_processes(len(units), cores)
    context = multiprocessing.get_context("forkserver")
    count = _processes(len(units), cores)
    board = context.Array("q", count * _NUMBERS, lock=False)
    slots, busy, stop = context.Value("i", 0), context.Value("i", 0), context.Value("b", 0)
    arguments = (board, slots, busy, stop, cores)
    # The server forks once it has imported, seconds later. Ctrl-C may come until then, but not while the processes that
    # are given these arguments begin: they would look for what this process has taken away with it.
    first = context.Process(target=_nothing)
    first.start()
    first.join()
    with ProcessPoolExecutor(count, mp_context=context, initializer=_join, initargs=arguments) as pool:
        # The largest first, so that the processes end at about the same time.
        ordered = sorted(units, key=lambda unit: -unit.bytes)
        try:
            with _interrupts_held():
                waiting: set[Future[None]] = {pool.submit(_work, work, job, unit) for unit in ordered}
            while waiting:
                done, waiting = wait(waiting, _POLL_SECONDS, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                display.show(*(sum(board[number::_NUMBERS]) for number in range(_NUMBERS)))
        except BrokenProcessPool as error:
            lost = "a process was killed, perhaps for want of memory"
            raise UserError(f"{lost}; start the same command again, with fewer --num_workers: it continues") from error
        except BaseException:
            stop.value = 1
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _join(board: Any, slots: Any, busy: Any, stop: Any, cores: int) -> None:
    """Begin as a process of the pool."""
    global _member
    with slots.get_lock():
        slot = slots.value
        slots.value += 1
    os.environ["RAYON_NUM_THREADS"] = str(cores)
    _member = _Member(board, slot, busy, stop, cores)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Wait for the end of the parent, which may be killed, and end too."""
    parent = multiprocessing.parent_process()
    if parent is None:
        raise UserError("a process of the pool has no parent")
    wait_for_any([parent.sentinel])
    os._exit(1)


def _work(work: Work, job: Job, unit: Unit) -> None:
    _member.run(work, job, unit)
