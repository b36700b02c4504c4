"""Clears the shared memory that killed runs leave behind, and never that of a live one.

Streaming coordinates the processes of a run through segments in `/dev/shm`, named by a number that counts
up from 000000, and lock files of the same number in the temporary folder. A run that is killed leaves them.
Leftovers waste memory, and one that had a remote refuses the next run the use of its cache folder
("Reused local directory"). Streaming's own `clean_stale_shared_memory` removes every segment, live or not.

Here each run leaves a claim beside its segments, a file it holds an `flock` on for as long as any of its
processes lives. The kernel drops the lock with the last of them, however they die, and the lock is seen
across containers that share `/dev/shm`, where process ids are not. A claim also records which segment it
speaks for (its inode), so that a number that went to another program since is left alone, as is everything
without a claim.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from socket import gethostname
from tempfile import gettempdir
from typing import Any

from anymixer.errors import UserError

SHARED_MEMORY = Path("/dev/shm")
_START_LOCK = "anymixer-start.lock"
_CLAIM_SUFFIX = "_anymixer"
_START_TIMEOUT = 60.0  # seconds, counted in the attempts that are made in them: a machine that stands still makes none
_ATTEMPTS_EVERY = 0.05  # seconds

# Descriptors of our claims: open, and so locked, until this process and those it forked have ended.
_held: list[int] = []


@contextmanager
def starting_alone(*, node: int, leader: bool) -> Iterator[None]:
    """Let one run at a time look for a free number and take it, and clear what dead runs left.

    Two runs that start together would otherwise both find the same number free, and one would fail. Only
    the first process of a node (`leader`) takes the lock and looks; the others wait for it if a process group exists.
    Raises UserError where two nodes of a run are one machine.
    """
    from torch import distributed

    if not SHARED_MEMORY.is_dir():  # macOS: segments cannot be listed
        yield
        return
    together = distributed.is_available() and distributed.is_initialized()
    if together:
        _check_one_node_here(node)
    lock = _start_lock() if leader else None
    try:
        if leader:
            clear_stale()
        if together:
            distributed.barrier()
        with _one_search(node, leader, together):
            yield
    finally:
        if lock is not None:
            os.close(lock)


def _check_one_node_here(node: int) -> None:
    """Streaming's nodes would take each other's segments, and one would wait for the other's lock."""
    from torch import distributed

    boot = Path("/proc/sys/kernel/random/boot_id")
    here = boot.read_text() if boot.exists() else gethostname(), SHARED_MEMORY.stat().st_dev
    seen: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(seen, (here, node))
    nodes = sorted({number for where, number in seen if where == here})
    if len(nodes) > 1:
        raise UserError(
            f"node_rank: {' and '.join(map(str, nodes))} of this run share one machine's /dev/shm; start all ranks of "
            f"a machine by one launcher (composer -n {sum(where == here for where, _ in seen)} ...)"
        )


@contextmanager
def _one_search(node: int, leader: bool, together: bool) -> Iterator[None]:
    """Have one process of a node look for streaming's free number, and close what it looks at.

    In streaming every rank looks by itself: where another run ends meanwhile, they find different numbers, and the
    launch hangs. And each keeps what it looked at, six segments of every run on the machine, open to its end.
    """
    from streaming.base.shared import prefix
    from torch import distributed

    search, segment = prefix._check_and_find_retrying, prefix.SharedMemory

    def find(*arguments: Any, **options: Any) -> int:
        found: Any = None
        if leader:
            prefix.SharedMemory = partial(segment, auto_cleanup=False)
            try:
                found = search(*arguments, **options)
            except ValueError as error:  # the cache folder is in use; all ranks are to say so
                found = error
            finally:
                prefix.SharedMemory = segment
        if together:
            seen: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(seen, (node, found))
            found = next(number for where, number in seen if where == node and number is not None)
        if isinstance(found, ValueError):
            raise found
        return found

    prefix._check_and_find_retrying = find
    try:
        yield
    finally:
        prefix._check_and_find_retrying = search


def claim(number: int) -> None:
    """Mark the segments of this number as belonging to a run that lives as long as this process: once a node."""
    segment = _segment(number)
    if not segment.exists():
        return
    path = SHARED_MEMORY / f"{number:06}{_CLAIM_SUFFIX}"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(segment.stat().st_ino).encode(), 0)
    _held.append(descriptor)
    _remove_at_the_end(path, descriptor)


def _remove_at_the_end(path: Path, descriptor: int) -> None:
    """Have a claim go with its segments: when this process ends, or by Python's tracker of what a killed one leaves."""
    resource_tracker.register(f"/{path.name}", "shared_memory")

    def remove() -> None:
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(descriptor).st_ino:  # else the number is another program's now
                path.unlink()
        resource_tracker.unregister(f"/{path.name}", "shared_memory")

    atexit.register(remove)


def clear_stale() -> list[int]:
    """Remove the segments and lock files of runs of this package that have died; return their numbers."""
    return [number for path in sorted(SHARED_MEMORY.glob(f"{'[0-9]' * 6}{_CLAIM_SUFFIX}")) for number in _clear(path)]


def _clear(path: Path) -> list[int]:
    number = int(path.name.removesuffix(_CLAIM_SUFFIX))
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:  # another user's, or gone since it was listed
        return []
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        segment = _segment(number)
        inode = os.pread(descriptor, 32, 0).decode()
        if not inode:  # its run is about to write it
            return []
        if segment.exists() and str(segment.stat().st_ino) != inode:  # the number is another program's now
            path.unlink()
            return []
        for leftover in (*SHARED_MEMORY.glob(f"{number:06}_*"), *_lock_files(number)):
            leftover.unlink(missing_ok=True)
        return [number]
    except OSError:  # its run lives, or the files are not ours to remove
        return []
    finally:
        os.close(descriptor)


def _start_lock() -> int | None:
    """Return the descriptor of the lock, or None after a minute: starting unprotected beats not starting."""
    try:
        descriptor = os.open(SHARED_MEMORY / _START_LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:  # made by another user
        return None
    for _ in range(round(_START_TIMEOUT / _ATTEMPTS_EVERY)):
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        time.sleep(_ATTEMPTS_EVERY)
    os.close(descriptor)
    return None


def _segment(number: int) -> Path:
    return SHARED_MEMORY / f"{number:06}_locals"


def _lock_files(number: int) -> list[Path]:
    return [Path(gettempdir()) / f"{number:06}_{name}_filelock" for name in ("barrier", "cache")]
