"""Finds the rank that a launch has lost: every rank tells the others, once a second, that it lives and what it does.

A rank that dies, fails, or is stopped is named within `rank_timeout` seconds by the lowest of the others, and all end
with exit code LOST_RANK; one that lives but keeps the others waiting, shortly before `dist_timeout`, at which torch
would end them without naming it (`rank_verdict` says how it is told). Two threads do this, so that neither a step that
takes long (compiling, evaluating, writing a checkpoint) nor a collective that never returns can keep them from it.

What is told goes through the store that the ranks met in, which rank 0 keeps (or torchrun), by a connection of its own.
"""

import atexit
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

import psutil
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import dist
from torch.distributed import DistError, TCPStore

from anymixer.training.rank_verdict import Beat, Seen, Verdict, judge, unanswered
from anymixer.training.whereabouts import Whereabouts, main_thread, where_raised

# EX_TEMPFAIL of sysexits.h: nothing is wrong with the command, which can be started again.
LOST_RANK = 75
# Seconds between two beats, up to this many ranks; more of them beat the less often.
_INTERVAL, _RANKS_A_SECOND = 1.0, 64
# Seconds that the main thread gets to end by itself once it is clear that the launch has ended.
_GRACE = 5.0
# Seconds that rank 0, which keeps the store, waits for the others to read it for the last time.
_LINGER = 5.0
_EXCHANGE_ERRORS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe")

_watch: "RankWatch | None" = None


def start_watch(rank_timeout: float, dist_timeout: float) -> None:
    """Watch over the ranks of this launch from now on, with these limits (in seconds); `rank_timeout` 0: do not."""
    global _watch
    if dist.get_world_size() == 1 or rank_timeout == 0:
        return
    if _watch is None:
        _watch = RankWatch()
        atexit.register(_watch.end)
    _watch.rank_timeout, _watch.dist_timeout = rank_timeout, dist_timeout
    _watch.start()


@contextlib.contextmanager
def ends_told() -> Iterator[None]:
    """Tell the other ranks why the block ends, if by an exception; and ask them, if it is for want of another rank.

    Raises SystemExit(LOST_RANK) for the latter, once a rank has said which.
    """
    watch = _watch
    if watch is None:
        yield
        return
    watch.failure = None
    try:
        yield
    except BaseException as error:
        try:
            lost = watch.explains(error)
        except SystemExit:  # asked to end while it waited for the explanation
            lost = watch.explains(error)
        if lost:
            raise SystemExit(LOST_RANK) from error
        raise


class RankProgress(Callback):
    """Counts the events of the training loop for the watch; each is a move forward."""

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """Note the event."""
        if _watch is not None:
            _watch.step = int(state.timestamp.batch)
            _watch.moves += 1


class RankWatch:
    """This rank's beats, what it sees of the others', and what it makes of that."""

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_global_rank(), dist.get_world_size()
        self.rank_timeout = self.dist_timeout = 0.0
        self.interval = _INTERVAL * max(1.0, self.world_size / _RANKS_A_SECOND)
        self.step = self.moves = 0
        self.failure: str | None = None
        process = psutil.Process()
        self._beat = Beat(
            rank=self.rank, host=socket.gethostname(), machine=_machine(), pid=process.pid, born=process.create_time()
        )
        # torchrun keeps its store when it starts the ranks anew.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._keys = [f"anymixer/attempt {attempt}/rank {rank}" for rank in range(self.world_size)]
        self._seen: dict[int, Seen] = {}
        self._gone: dict[int, float] = {}
        self._exchanged_at = time.monotonic()
        self._unanswered = False
        self._left: Whereabouts | None = None
        self._impatient = self._asked_to_end = False
        self._verdict: Verdict | None = None
        self._decided, self._leaving, self._told = (threading.Event() for _ in range(3))
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Meet in the store and start the threads, once."""
        if self._threads:
            return
        self._store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=self.dist_timeout),
        )
        self._publish()
        self._store.wait(self._keys)
        self._read()
        self._threads = [
            threading.Thread(target=target, name=target.__name__, daemon=True)
            for target in (self._exchange, self._look)
        ]
        for thread in self._threads:
            thread.start()

    def explains(self, error: BaseException) -> bool:
        """Whether this process ends by `error` because another rank is lost; waits for the watch to find out."""
        self._left = where_raised(error)
        if isinstance(error, SystemExit):  # Composer's answer to SIGTERM, which a launcher sends when a rank has died
            self.failure, self._asked_to_end = "was asked to end", True
            found = self._wait(4 * self.interval)
        else:
            found = _is_exchange_error(error) and self._wait(self.rank_timeout + 4 * self.interval)
            self.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return found

    def _wait(self, seconds: float) -> bool:
        self._impatient = True
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._asked_to_end and all(one.beat.ending for one in self._others()):
                return False  # so were all, and none is lost
            if self._decided.wait(0.1):
                return True
        return False

    def end(self) -> None:
        """Tell the others that this process ends, and why if it has failed; rank 0 waits for them to read it.

        Once a rank is lost the process ends here: what Python and NCCL do after this may wait for that rank.
        """
        self._leaving.set()
        if not self._unanswered:
            self._told.wait(max(_LINGER, 2 * self.interval))
        if self._verdict is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(LOST_RANK)

    def _others_end(self) -> bool:
        """Whether the others have ended, or will: rank 0 must stay until they know what it knows."""
        beats = [one.beat for one in self._others()]
        return all(beat.ending or beat.verdict or _condition(self._beat, beat) == "gone" for beat in beats)

    def _others(self) -> list[Seen]:
        return [one for rank, one in list(self._seen.items()) if rank != self.rank]

    def _now(self) -> Beat:
        """This rank's beat of this moment."""
        doing = self._left or main_thread()
        ending = self._leaving.is_set() or self._asked_to_end
        return replace(
            self._beat,
            moves=self.moves,
            step=self.step,
            doing=str(doing),
            waits=doing.waits,
            ending=ending,
            failure=self.failure if ending else None,
            verdict=None if self._verdict is None else self._verdict.text,
            speaker=0 if self._verdict is None else self._verdict.speaker,
        )

    def _publish(self) -> None:
        self._beat = replace(self._now(), count=self._beat.count + 1)
        self._store.set(self._keys[self.rank], self._beat.to_json())

    def _read(self) -> None:
        texts = self._store.multi_get(self._keys)  # pyright: ignore[reportAttributeAccessIssue]
        now = time.monotonic()
        for text in texts:
            beat = Beat.from_json(text)
            seen = self._seen.get(beat.rank, Seen(beat, now, now))
            self._seen[beat.rank] = seen.updated(beat, now)
        self._exchanged_at = now

    def _exchange(self) -> None:
        """Tell and read, again and again. A thread of its own, because a store that is stopped never answers."""
        try:
            while not self._leaving.is_set():
                self._publish()
                self._read()
                self._leaving.wait(self.interval)
            self._publish()
            while self.rank == 0 and not self._others_end():
                time.sleep(0.05)
                self._read()
        except (DistError, RuntimeError):  # the store has ended; what that means is for `_look` to say
            self._unanswered = True
        self._told.set()

    def _look(self) -> None:
        """Judge, again and again; end the process when a rank is lost."""
        before = time.monotonic()
        while not self._leaving.wait(self.interval / 2):
            now = time.monotonic()
            if now - before > 5 * self.interval:  # this process was stopped itself, or its machine
                self._forget(now)
            before = now
            verdict = self._judge(now)
            if verdict is not None:
                self._conclude(verdict)

    def _forget(self, now: float) -> None:
        self._exchanged_at = now
        self._seen = {rank: Seen(one.beat, now, now) for rank, one in self._seen.items()}

    def _judge(self, now: float) -> Verdict | None:
        # What this rank has told of itself is old where the store does not answer.
        seen = self._seen | {self.rank: replace(self._seen[self.rank], beat=self._now())}
        verdict = judge(
            seen,
            self.rank,
            self._exchanged_at,
            now,
            rank_timeout=self.rank_timeout,
            dist_timeout=self.dist_timeout,
            condition=self._condition,
            impatient=self._impatient,
            asked_to_end=self._asked_to_end,
        )
        silent = self._unanswered or now - self._exchanged_at > self.rank_timeout
        if verdict is None and silent and self.rank != 0 and not seen[0].beat.ending:
            verdict = unanswered(seen, lambda beat: _condition(self._beat, beat))
        return verdict

    def _condition(self, beat: Beat) -> str | None:
        """As `_condition`, but a process that is gone counts once its last words, which may explain it, are read."""
        found = _condition(self._beat, beat)
        if found == "gone" and self._exchanged_at <= self._gone.setdefault(beat.rank, time.monotonic()):
            return None
        return found

    def _conclude(self, verdict: Verdict) -> None:
        """Say it, have it told, and end this process if the main thread does not by itself."""
        if verdict.speaker == self.rank:
            # In one piece, and whatever lock the main thread holds; below the progress bar.
            os.write(2, f"\nerror: {verdict.text}\n".encode())
        self._verdict = verdict
        for rank in verdict.lost:
            self._kill(self._seen[rank].beat)
        self._decided.set()
        time.sleep(max(_GRACE, 2 * self.interval))
        os._exit(LOST_RANK)

    def _kill(self, beat: Beat) -> None:
        """End a process of this machine that is stopped. A launcher takes half a minute to, and then ends the process
        that removes its shared memory too."""
        if _condition(self._beat, beat) == "stopped":
            with contextlib.suppress(ProcessLookupError):
                os.kill(beat.pid, signal.SIGKILL)


def _machine() -> str:
    """The name space that this process's id means something in; "" where there is none to be known."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _condition(mine: Beat, beat: Beat) -> str | None:
    """What became of a process of this machine: "gone", "stopped" or "running"; None if that cannot be known here."""
    if not mine.machine or beat.machine != mine.machine:
        return None
    try:
        process = psutil.Process(beat.pid)
        if abs(process.create_time() - beat.born) > 1 or process.status() == psutil.STATUS_ZOMBIE:
            return "gone"
        return "stopped" if process.status() == psutil.STATUS_STOPPED else "running"
    except psutil.NoSuchProcess:
        return "gone"


def _is_exchange_error(error: BaseException) -> bool:
    """Whether an exception is torch's for a rank that is not there any more, or does not answer."""
    if isinstance(error, DistError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error).lower() for part in _EXCHANGE_ERRORS)
