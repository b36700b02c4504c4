"""Runs jobs, each in a process of its own on a device of its own, so that none can take another with it.

A process that dies is started once more; then the job counts as failed, with the end of its log, and the rest goes
on. What a process holds (its job, its device) is a lock that it inherits: should this program be killed while jobs
live on, the next start waits for them instead of running them twice or sharing their GPU.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from anymixer.errors import UserError
from anymixer.glue.graph import Node
from anymixer.glue.results import LOCK_NAME, Failure, Store, try_lock
from anymixer.glue.spec import JobResult

# Scores of the jobs that have ended -> all jobs that are known then; as `Outcome.scores` and `build_graph`.
Grow = Callable[[Mapping[str, float | None]], Sequence[Node]]
JOB_COMMAND = (sys.executable, "-m", "anymixer.glue.job")
ATTEMPTS = 2
LOG_LINES = 15
# Exit code of a job whose keys or files are at fault: once more would not help.
USER_MISTAKE = 2
# Seconds between two looks at the processes, and those that they get to end when they are told to.
_POLL, _GRACE = 0.1, 20.0


@dataclass(frozen=True)
class Slot:
    """A place to run one job at a time. device: as in JobSpec. environment: what pins a process to it."""

    name: str
    device: str
    environment: Mapping[str, str]


@dataclass
class _Running:
    node: Node
    slot: Slot
    process: subprocess.Popen
    started: float
    log_start: int
    overdue: bool = False


@dataclass
class Outcome:
    """What has become of the jobs. failed: job id -> reason, in one line."""

    finished: dict[str, JobResult] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def scores(self) -> dict[str, float | None]:
        """Job id -> score, None for the failed: what `build_graph` takes."""
        return {**{job: result.score for job, result in self.finished.items()}, **dict.fromkeys(self.failed)}


class Runner:
    """Runs jobs in the slots of this machine and keeps what came of them in `outcome`."""

    def __init__(
        self,
        store: Store,
        slots: Sequence[Slot],
        *,
        command: Sequence[str] = JOB_COMMAND,
        say: Callable[[str], None] = print,
        time_limit: float | None = None,
    ) -> None:
        """command: what starts a job when SPEC.json and FOLDER are added to it. time_limit: seconds after which an
        attempt of a job is killed; None lets it run."""
        self.store = store
        self.slots = list(slots)
        self.command = list(command)
        self.say = say
        self.time_limit = time_limit
        self.outcome = Outcome()
        self._attempts: dict[str, int] = {}
        self._running: list[_Running] = []
        self._told: set[str] = set()
        self._total = 0

    def run(self, nodes: Sequence[Node], total: int, grow: Grow | None = None) -> None:
        """Run what is not finished yet, and return when every job is, or has failed.

        total: how many jobs the whole run has, for the lines that are printed. grow: the jobs that are known once these
        have ended, given their scores; asked whenever one ends, so that no slot is idle while others still run. Ctrl-C
        and SIGTERM end the jobs' processes and are passed on.
        """
        self._total = total
        known, settled = {node.job_id for node in nodes}, -1
        waiting = [node for node in nodes if not self._is_settled(node)]
        try:
            with _signals_put_off() as raise_noted:
                while True:
                    raise_noted()
                    self._end_overdue()
                    self._collect(waiting)
                    waiting = self._start_ready(waiting)
                    if grow is not None and settled != (settled := self._settled()):
                        grown = [node for node in grow(self.outcome.scores()) if node.job_id not in known]
                        known |= {node.job_id for node in grown}
                        waiting += grown
                    elif waiting or self._running:
                        time.sleep(_POLL)
                    else:
                        return
        except BaseException:
            self._stop()
            raise

    def _is_settled(self, node: Node) -> bool:
        """Whether a job has ended in this or an earlier start; a failure of an earlier one is tried again."""
        if node.job_id in self.outcome.finished or node.job_id in self.outcome.failed:
            return True
        result = self.store.result(node.job_id)
        if result is not None:
            self.outcome.finished[node.job_id] = result
        return result is not None

    def _start_ready(self, waiting: list[Node]) -> list[Node]:
        """Start what can be started; return what still has to wait."""
        left = []
        for node in waiting:
            if self._is_settled(node):
                continue  # by a process of an earlier start, which has ended meanwhile
            problem = self._problem_with_start(node)
            if problem is not None:
                self._give_up(node, problem)
            elif (node.needs is not None and node.needs not in self.outcome.finished) or not self._start(node):
                left.append(node)
        return left

    def _problem_with_start(self, node: Node) -> str | None:
        """Why a job can never start: the one whose checkpoint it needs has failed, or has none any more."""
        if node.needs in self.outcome.failed:
            return f"not started: it needs {node.needs}, which failed"
        needed = self.outcome.finished.get(node.needs or "")
        if needed is None or (needed.checkpoint is not None and self._checkpoint(needed).exists()):
            return None
        folder = self.store.job_folder(needed.job_id)
        return f"not started: the checkpoint in {folder} is gone; move that folder away to train it again"

    def _checkpoint(self, result: JobResult) -> Path:
        return self.store.job_folder(result.job_id) / (result.checkpoint or "")

    def _start(self, node: Node) -> bool:
        """Start a job's process in a free slot; False when there is none, or a process of it lives already."""
        busy = {running.slot.name for running in self._running}
        free = [slot for slot in self.slots if slot.name not in busy]
        if not free or (job_lock := self._lock(self.store.job_folder(node.job_id) / LOCK_NAME, node.job_id)) is None:
            return False
        try:
            for slot in free:
                slot_lock = self._lock(self.store.folder / "slots" / slot.name, slot.name)
                if slot_lock is not None:
                    try:
                        self._running.append(self._launch(node, slot, (job_lock, slot_lock)))
                    finally:
                        os.close(slot_lock)
                    return True
        finally:
            os.close(job_lock)
        return False

    def _lock(self, path: Path, name: str) -> int | None:
        descriptor = try_lock(path)
        if descriptor is None and name not in self._told:
            self._told.add(name)
            self.say(f"{name}: in use by a process of an earlier start; waiting for its end")
        return descriptor

    def _launch(self, node: Node, slot: Slot, locks: tuple[int, int]) -> _Running:
        folder = self.store.job_folder(node.job_id)
        spec = replace(node.spec, device=slot.device)
        if node.needs is not None:
            start = self._checkpoint(self.outcome.finished[node.needs]).resolve()
            spec = replace(spec, resolved_starting_point=str(start))
        path = self.store.write_spec(node.job_id, spec)
        self.store.clear_failure(node.job_id)
        attempt = self._attempts[node.job_id] = self._attempts.get(node.job_id, 0) + 1
        with open(self.store.log(node.job_id), "a", encoding="utf-8") as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {slot.name}, attempt {attempt}\n")
            log.flush()
            log_start = log.tell()
            # In a session of its own, so that Ctrl-C reaches this program alone, which then ends the jobs.
            process = subprocess.Popen(
                [*self.command, str(path), str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **slot.environment},
                pass_fds=locks,
                start_new_session=True,
            )
        self.say(f"{node.job_id}: started on {slot.name}")
        return _Running(node, slot, process, time.monotonic(), log_start)

    def _end_overdue(self) -> None:
        """Kill the processes that have run longer than a job may: one that hangs would hold its slot for ever."""
        for running in self._running:
            overdue = self.time_limit is not None and time.monotonic() - running.started > self.time_limit
            if overdue and running.process.poll() is None:
                running.overdue = True
                _signal_group(running.process, signal.SIGKILL)
                running.process.wait()

    def _collect(self, waiting: list[Node]) -> None:
        """Take in the processes that have ended; one to be tried again goes to the front of `waiting`."""
        for running in [running for running in self._running if running.process.poll() is not None]:
            self._running.remove(running)
            job_id, code = running.node.job_id, running.process.returncode
            seconds = time.monotonic() - running.started
            if self._is_settled(running.node):
                result = self.outcome.finished[job_id]
                self.say(f"{self._place()} {job_id}: {100 * result.score:.2f}, {seconds:.0f} s, {running.slot.name}")
                continue
            lines = self._log_end(running)
            reason = (
                f"took longer than job_time_limit = {self.time_limit} s" if running.overdue else _reason(code, lines)
            )
            if self._attempts[job_id] < ATTEMPTS and code != USER_MISTAKE:
                self.say(f"{job_id}: {reason}, after {seconds:.0f} s; trying once more")
                waiting.insert(0, running.node)
            else:
                self._give_up(running.node, reason, lines)

    def _give_up(self, node: Node, reason: str, lines: Sequence[str] = ()) -> None:
        job_id, attempts = node.job_id, self._attempts.get(node.job_id, 0)
        self.outcome.failed[job_id] = reason
        failure = Failure(
            job_id=job_id,
            task=node.spec.task,
            seed=node.spec.seed,
            attempts=attempts,
            reason=reason,
            log=str(self.store.log(job_id)),
            log_end=list(lines),
        )
        self.store.write_failure(failure)
        self.say(f"{self._place()} {job_id}: failed, {reason}")
        if lines and not reason.endswith(lines[-1]):
            self.say("\n".join(f"    {line}" for line in lines))

    def _log_end(self, running: _Running) -> list[str]:
        """The last lines that this attempt of the job printed."""
        text = self.store.log(running.node.job_id).read_bytes()[running.log_start :].decode(errors="replace")
        return [line.rstrip() for line in text.splitlines() if line.strip()][-LOG_LINES:]

    def _settled(self) -> int:
        return len(self.outcome.finished) + len(self.outcome.failed)

    def _place(self) -> str:
        done = self._settled()
        return f"[{done}/{max(self._total, done)}]"

    def _stop(self) -> None:
        """End all processes: first ask, then kill. Each leads a group, with its data loader's workers in it."""
        deadline = time.monotonic() + _GRACE
        try:
            for running in self._running:
                _signal_group(running.process, signal.SIGTERM)
            for running in self._running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    running.process.wait(max(0.0, deadline - time.monotonic()))
        finally:  # a second Ctrl-C comes here at once
            for running in self._running:
                _signal_group(running.process, signal.SIGKILL)
                running.process.wait()
            self._running.clear()


def _reason(code: int, lines: Sequence[str]) -> str:
    """Why a process ended without a result, in one line."""
    if code == -signal.SIGKILL:
        return "killed by SIGKILL (by somebody, or by the system for want of memory)"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    if code == 0:
        return "ended without a result"
    return f"exit code {code}: {lines[-1] if lines else 'no output'}"


def _signal_group(process: subprocess.Popen, number: int) -> None:
    # The group may have ended already, and then there is nobody to tell.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


@contextlib.contextmanager
def _signals_put_off() -> Iterator[Callable[[], None]]:
    """Only note Ctrl-C, SIGTERM and the end of the terminal; what is yielded raises what they stand for.

    An exception in the middle of starting a process would leave one that nobody knows of.
    """
    noted: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def raise_noted() -> None:
        if signal.SIGINT in noted:
            raise KeyboardInterrupt
        if noted:
            sys.exit(128 + noted[0])

    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:  # as nohup sets it
                signal.signal(number, lambda number, _: noted.append(number))
        yield raise_noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def find_slots(device: str | None, at_once: int | None, jobs: int) -> list[Slot]:
    """One slot for each GPU, or for each core of a machine without any; no more than jobs.

    device: "gpu", "cpu" or None for whichever there is. at_once: another number of slots; on GPUs they take turns.
    Raises UserError for "gpu" where torch sees none.
    """
    gpus = [] if device == "cpu" else visible_gpus()
    if device == "gpu" and not gpus:
        raise UserError("device: gpu, but torch sees no CUDA device here; remove the key or set device=cpu")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    number = max(1, min(at_once or len(gpus) or cores, jobs))
    threads = {"OMP_NUM_THREADS": str(max(1, cores // number)), "TOKENIZERS_PARALLELISM": "false"}
    if not gpus:
        return [Slot(f"cpu-{i}", "cpu", {**threads, "CUDA_VISIBLE_DEVICES": ""}) for i in range(number)]
    turns = [(gpus[i % len(gpus)], i // len(gpus)) for i in range(number)]
    return [
        Slot(f"gpu-{gpu}" + (f"-{turn}" if turn else ""), "gpu", {**threads, "CUDA_VISIBLE_DEVICES": gpu})
        for gpu, turn in turns
    ]


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each GPU that this process may use; looks without holding one."""
    import torch

    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    count = torch.cuda.device_count()
    return named[:count] if named else [str(i) for i in range(count)]
