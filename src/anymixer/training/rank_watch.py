"""Finds the rank that a launch has lost: every rank tells the others, again and again, that it lives and what it does.

A rank that dies, fails, or is stopped is named within `rank_timeout` seconds by the lowest of the others, and all end
with exit code LOST_RANK, or FAILED where it would fail again; one that lives but keeps the others waiting, shortly
before `dist_timeout`, at which torch would end them without naming it (`rank_verdict` says how it is told). Two
threads do this, so that neither a step that takes long (compiling, evaluating, writing a checkpoint) nor a collective
that never returns can keep them from it.

What is told goes through the store that the ranks met in, which rank 0 keeps (or torchrun), by a connection of its own.
"""

import atexit
import contextlib
import itertools
import os
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import timedelta

import psutil
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import dist
from torch.distributed import DistError, TCPStore

from anymixer.training.rank_process import born, condition_of, machine
from anymixer.training.rank_verdict import STANDSTILL_SHARE, Beat, Seen, Verdict, judge, unanswered
from anymixer.training.whereabouts import SAVING, Whereabouts, main_thread, where_raised

# Seconds between two beats, up to this many ranks; more of them beat the less often.
_INTERVAL, _RANKS_A_SECOND = 1.0, 64
# A rank that has missed fewer beats than this is not silent, whatever `rank_timeout` says.
_MISSED = 5
# Seconds that a thread sleeps at a time while it waits for another of this process.
_MOMENT = 0.1
# Seconds that the main thread gets to end by itself once it is clear that the launch has ended.
_GRACE = 5.0
# Seconds that whatever comes after SIGTERM may take: the launcher, which sent it, kills after 30.
_AFTER_SIGTERM = 20.0
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
    _watch.rank_timeout = max(rank_timeout, _MISSED * _watch.interval)
    _watch.dist_timeout = dist_timeout
    _watch.start()


@contextlib.contextmanager
def ends_told() -> Iterator[None]:
    """Tell the other ranks why the block ends, if by an exception; and ask them, if it is for want of another rank.

    Raises SystemExit(LOST_RANK or FAILED) for the latter, once a rank has said which. May stand in another such block:
    an exception is explained once.
    """
    if _watch is not None:
        _watch.failure = _watch.left = None
    try:
        yield
    except BaseException as error:
        if _watch is None:
            raise
        try:
            verdict = _watch.explains(error)
        except SystemExit as asked:  # to end, while it waited for the explanation
            verdict = _watch.explains(asked)
        if verdict is not None:
            # It ends already; the launcher's wish that it does would break into that, at any point.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise SystemExit(verdict.exit_code) from error
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
        self._grace = min(max(_GRACE, 2 * self.interval), _AFTER_SIGTERM)
        process = psutil.Process()
        self._beat = Beat(
            rank=self.rank, host=socket.gethostname(), machine=machine(), pid=process.pid, born=born(process)
        )
        # torchrun keeps its store when it starts the ranks anew, and counts that on each machine for itself.
        launch = [uuid.uuid4().hex]
        dist.broadcast_object_list(launch)
        self._keys = [f"anymixer/{launch[0]}/rank {rank}" for rank in range(self.world_size)]
        self._store: TCPStore | None = None
        self._seen: dict[int, Seen] = {}
        self._gone: dict[int, float] = {}
        self._exchanged_at = time.monotonic()
        self.left: Whereabouts | None = None
        self._explained: BaseException | None = None
        self._impatient = self._asked_to_end = self._blameless = False
        self._verdict: Verdict | None = None
        self._decided, self._leaving, self._told = (threading.Event() for _ in range(3))
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Meet in the store and start the threads, once."""
        if self._threads:
            return
        self._publish()
        self._connected().wait(self._keys, timedelta(seconds=self.dist_timeout))
        self._read()
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=work.__name__, daemon=True)
            for work in (self._exchange, self._look)
        ]
        for thread in self._threads:
            thread.start()

    def _connected(self) -> TCPStore:
        if self._store is None:
            self._store = TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=self.rank_timeout),
            )
        return self._store

    def explains(self, error: BaseException) -> Verdict | None:
        """The verdict, if this process ends by `error` because another rank is lost; waits for the watch to find it."""
        if self._verdict is not None or error is self._explained:
            return self._verdict
        self.left = self.left or where_raised(error)
        # SystemExit is Composer's answer to SIGTERM, which a launcher sends when a rank has died, and to Ctrl-C.
        self._asked_to_end |= isinstance(error, SystemExit | KeyboardInterrupt)
        self._blameless = self._asked_to_end or _is_exchange_error(error)
        if self._asked_to_end:
            self.failure = "was asked to end"
            self._wait(min(4 * self.interval, _AFTER_SIGTERM))
        else:
            if self._blameless:
                # torch's clock has gone on while this process was stopped, and the watch's has not.
                standstill = STANDSTILL_SHARE * self.dist_timeout if _is_timeout(error) else 0.0
                self._wait(max(self.rank_timeout, standstill) + 4 * self.interval)
            self.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self._explained = error
        return self._verdict

    def _wait(self, seconds: float) -> None:
        self._impatient = True
        for moment in _moments(seconds):
            if self._decided.wait(moment) or (self._asked_to_end and all(map(_only_ends, self._others()))):
                return

    def end(self) -> None:
        """Tell the others that this process ends, and why if it has failed; rank 0 waits for them to read it.

        Once a rank is lost the process ends here: what Python and NCCL do after this may wait for that rank.
        """
        if self._verdict is not None:
            self._let_save(self._verdict)
        self._leaving.set()
        # At a good end a rank may be as slow to read this as it may be to beat.
        seconds = self.rank_timeout if self.rank == 0 and self.failure is None else self._grace
        for moment in _moments(seconds):
            if self._told.wait(moment):
                break
        if self._verdict is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self._verdict.exit_code)

    def _others(self) -> list[Seen]:
        return [one for rank, one in list(self._seen.items()) if rank != self.rank]

    def _now(self) -> Beat:
        """This rank's beat of this moment."""
        doing = self.left or main_thread()
        ending = self._leaving.is_set() or self._asked_to_end
        return replace(
            self._beat,
            moves=self.moves,
            step=self.step,
            doing=str(doing),
            waits=doing.waits,
            ending=ending,
            failure=self.failure if ending else None,
            blameless=self._blameless,
            verdict=self._verdict,
        )

    def _publish(self) -> None:
        self._beat = replace(self._now(), count=self._beat.count + 1)
        self._connected().set(self._keys[self.rank], self._beat.to_json())

    def _read(self) -> None:
        texts = self._connected().multi_get(self._keys)  # pyright: ignore[reportAttributeAccessIssue]
        now = time.monotonic()
        for text in texts:
            beat = Beat.from_json(text)
            seen = self._seen.get(beat.rank, Seen(beat, now, now, now))
            self._seen[beat.rank] = seen.updated(beat, now)
        self._exchanged_at = now

    def _exchange(self) -> None:
        """Tell and read, again and again. A thread of its own, because a store that is stopped never answers."""
        while not self._leaving.is_set():
            try:
                self._publish()
                self._read()
            except RuntimeError:  # as are all errors of the store; what they mean is for `_look` to say
                self._store = None
            self._leaving.wait(self.interval)
        with contextlib.suppress(RuntimeError):
            self._publish()
            self._read()
            told = {one.beat.rank: one.beat.count for one in self._others()}
            while self.rank == 0 and not all(self._knows(one.beat, told) for one in self._others()):
                time.sleep(0.05)
                self._read()
        self._told.set()

    def _knows(self, beat: Beat, told: dict[int, int]) -> bool:
        """Whether a rank has ended, will, or has read since (between two beats) the last words of rank 0."""
        gone = condition_of(self._beat, beat) == "gone"
        return beat.ending or beat.verdict is not None or gone or beat.count >= told[beat.rank] + 2

    def _guarded(self, work: Callable[[], None]) -> None:
        """Do the work of a thread; a mistake of the watch's own ends the watch of this rank, and no launch."""
        try:
            work()
        except Exception:
            traceback.print_exc()
            self._leaving.set()
            with contextlib.suppress(RuntimeError):
                self._publish()  # as ending: nobody misses its beats
            self._told.set()

    def _look(self) -> None:
        """Judge, again and again; end the process when a rank is lost."""
        before = time.monotonic()
        while not self._leaving.wait(self.interval / 2):
            now = time.monotonic()
            if now - before > _MISSED * self.interval:  # this process was stopped itself, or its machine
                self._leave_out(now - before, now)
            before = now
            verdict = self._judge(now)
            if verdict is not None:
                self._conclude(verdict)

    def _leave_out(self, seconds: float, now: float) -> None:
        self._exchanged_at = min(self._exchanged_at + seconds, now)
        self._seen = {rank: one.without(seconds, now) for rank, one in self._seen.items()}

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
        if verdict is None and self.rank != 0 and not seen[0].beat.ending and self._unanswered(now):
            store = f"torchrun's store at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            keeper = store if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else None
            verdict = unanswered(seen, self.rank, lambda beat: condition_of(self._beat, beat), keeper)
        return verdict

    def _unanswered(self, now: float) -> bool:
        """Whether the store has ended: for long, or with rank 0, which keeps it."""
        ended = self._store is None and condition_of(self._beat, self._seen[0].beat) == "gone"
        return ended or now - self._exchanged_at > self.rank_timeout

    def _condition(self, beat: Beat) -> str | None:
        """As `condition_of`, but a process that is gone counts once its last words, which may explain it, are read."""
        found = condition_of(self._beat, beat)
        if found == "gone" and self._exchanged_at <= self._gone.setdefault(beat.rank, time.monotonic()):
            return None
        return found

    def _conclude(self, verdict: Verdict) -> None:
        """Say it, have it told, and end this process if the main thread does not by itself."""
        if verdict.speaker == self.rank:
            with contextlib.suppress(OSError):  # nobody reads it any more
                # In one piece, and whatever lock the main thread holds; below the progress bar.
                os.write(2, f"\nerror: {verdict.text}\n".encode())
        self._verdict = verdict
        for rank in verdict.lost:
            self._kill(self._seen[rank].beat)
        self._decided.set()
        for moment in _moments(self._grace):
            time.sleep(moment)
        self._let_save(verdict)
        os._exit(verdict.exit_code)

    def _let_save(self, verdict: Verdict) -> None:
        """Wait while a rank writes a checkpoint: the first to end has its launcher end those beside it."""
        for moment in _moments(_AFTER_SIGTERM):
            ranks = [one.beat for one in self._others() if one.beat.rank not in verdict.lost and not one.beat.ending]
            if not any(doing.startswith(SAVING) for doing in (str(main_thread()), *(beat.doing for beat in ranks))):
                return
            time.sleep(moment)

    def _kill(self, beat: Beat) -> None:
        """End a process of this machine that is stopped. A launcher takes half a minute to, and then ends the process
        that removes its shared memory too."""
        if condition_of(self._beat, beat) == "stopped":
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                os.kill(beat.pid, signal.SIGKILL)


def _moments(seconds: float) -> Iterable[float]:
    """What to sleep, again and again, to wait for another thread: it is stopped when this one is, so that the time that
    a process was stopped must not count."""
    return itertools.repeat(_MOMENT, round(seconds / _MOMENT))


def _only_ends(seen: Seen) -> bool:
    """Whether a rank ends, and not for a failure of its own."""
    return seen.beat.ending and (seen.beat.failure is None or seen.beat.blameless)


def _is_exchange_error(error: BaseException) -> bool:
    """Whether an exception is torch's for a rank that is not there any more, or does not answer."""
    if isinstance(error, DistError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error).lower() for part in _EXCHANGE_ERRORS)


def _is_timeout(error: BaseException) -> bool:
    """Whether an exception is torch's for a rank that kept this one waiting, rather than for a broken connection."""
    return any(part in str(error).lower() for part in ("timed out", "timeout"))
