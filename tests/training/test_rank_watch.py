"""The watch of one rank, in this process, and how it takes what the others do, or what becomes of their store."""

import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from torch.distributed import TCPStore

pytest.importorskip("composer")

from anymixer import pretrain
from anymixer.training import rank_watch
from anymixer.training.rank_process import condition_of
from anymixer.training.rank_verdict import Seen, Verdict
from anymixer.training.rank_watch import ends_told
from anymixer.training.whereabouts import SAVING

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

# Seconds for a thread to do what is tested, on a busy machine.
LIMIT = 600


@pytest.fixture
def watch(monkeypatch):
    """A launch of this process, which is rank 1, and a rank 0 elsewhere, not started; give its watch."""
    made = {"get_global_rank": 1, "get_world_size": 2, "broadcast_object_list": None}
    for name, answer in made.items():
        monkeypatch.setattr(rank_watch.dist, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(rank_watch, "_INTERVAL", 0.05)
    monkeypatch.setattr(rank_watch.signal, "signal", lambda *_: None)
    monkeypatch.setattr(rank_watch.os, "_exit", lambda code: pytest.fail(f"exit code {code}"))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    watch = rank_watch.RankWatch()
    monkeypatch.setattr(rank_watch, "_watch", watch)
    watch.rank_timeout, watch.dist_timeout = 5.0, 300.0
    now = time.monotonic()
    other = replace(watch._beat, rank=0, host="node0", machine="elsewhere")
    watch._seen = {beat.rank: Seen(beat, now, now, now) for beat in (other, watch._beat)}
    yield watch
    watch._leaving.set()
    for thread in watch._threads:
        thread.join(30)


def test_setting_the_clock_makes_no_process_another(watch, monkeypatch):
    boot = psutil.boot_time()
    assert condition_of(watch._beat, watch._beat) == "running"
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: boot + 100.0)
    assert condition_of(watch._beat, watch._beat) == "running"
    assert condition_of(watch._beat, replace(watch._beat, born=watch._beat.born - 100)) == "gone"


def test_machines_of_one_name_are_told_apart(watch, monkeypatch):
    assert socket.gethostname() not in watch._beat.machine
    assert Path("/proc/sys/kernel/random/boot_id").read_text().strip() in watch._beat.machine
    assert condition_of(watch._beat, replace(watch._beat, machine="elsewhere", pid=2**22)) is None


def test_a_process_that_may_not_be_looked_at_is_not_known(watch, monkeypatch):
    def denied(self):
        raise psutil.AccessDenied(self.pid)

    monkeypatch.setattr(psutil.Process, "status", denied)
    assert condition_of(watch._beat, watch._beat) is None


def test_more_ranks_beat_less_often_and_may_be_silent_longer(watch, monkeypatch):
    monkeypatch.setattr(rank_watch, "_INTERVAL", 1.0)
    monkeypatch.setattr(rank_watch, "_watch", None)
    monkeypatch.setattr(rank_watch.atexit, "register", lambda _: None)
    monkeypatch.setattr(rank_watch.RankWatch, "start", lambda self: None)
    monkeypatch.setattr(rank_watch.dist, "get_world_size", lambda: 1024)
    rank_watch.start_watch(45.0, 300.0)
    assert rank_watch._watch.rank_timeout == 80.0 and rank_watch._watch._grace == 20.0


def beats(store, watch):
    """Have rank 0 beat in a store."""
    store.set(watch._keys[0], watch._seen[0].beat.to_json())


def test_a_connection_that_breaks_is_made_again(watch, master_port, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", str(master_port))
    store = TCPStore("127.0.0.1", master_port, is_master=True, wait_for_workers=False)
    beats(store, watch)
    watch.start()
    del store
    deadline = time.monotonic() + LIMIT
    while watch._store is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert watch._store is None
    store = TCPStore("127.0.0.1", master_port, is_master=True, wait_for_workers=False)
    beats(store, watch)
    began = time.monotonic()
    deadline = began + LIMIT
    while watch._exchanged_at < began and time.monotonic() < deadline:
        time.sleep(0.05)
    assert watch._exchanged_at > began and watch._verdict is None
    watch._leaving.set()
    for thread in watch._threads:
        thread.join(30)


def test_a_store_that_ends_is_missed_after_a_while_or_at_once_with_its_process(watch, monkeypatch):
    watch._exchanged_at = now = time.monotonic()
    assert watch._store is None and watch._judge(now) is None
    found = watch._judge(now + 6)
    assert "rank 0 (process" in found.text and "answers no more" in found.text
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert watch._judge(now + 6).text.startswith("torchrun's store at 127.0.0.1:1 answers no more")
    gone = replace(watch._seen[0].beat, machine=watch._beat.machine, born=-100.0)
    watch._seen[0] = replace(watch._seen[0], beat=gone)
    assert "rank 0 (process" in watch._judge(now).text and "has died" in watch._judge(now).text
    watch._seen[0] = replace(watch._seen[0], beat=replace(gone, ending=True))
    assert watch._judge(now + 60) is None


def test_a_mistake_of_the_watch_ends_no_launch(watch, monkeypatch, capsys):
    def broken():
        raise KeyError("a mistake")

    told = []
    monkeypatch.setattr(watch, "_publish", lambda: told.append(watch._now()))
    watch._guarded(broken)
    assert "a mistake" in capsys.readouterr().err and told[0].ending and told[0].failure is None
    watch.end()


def test_a_failure_is_explained_once_however_many_blocks_it_leaves(watch):
    error = ValueError("mine")
    with pytest.raises(ValueError, match="mine"), ends_told(), ends_told():
        raise error
    assert (watch.failure, watch._now().blameless) == ("ValueError: mine", False)
    watch._leaving.set()
    assert watch._now().failure == "ValueError: mine"


class Clock:
    """Time that passes while somebody sleeps. In the first moment of it the process is stopped for an hour, and with it
    the thread that is waited for: what that does is done some moments later."""

    def __init__(self, done_after, done):
        self.now, self.slept, self.done_after, self.done = 1000.0, 0, done_after, done

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.slept += 1
        self.now += seconds + 3600 * (self.slept == 1)
        if self.slept == self.done_after:
            self.done()

    def wait(self, seconds):
        """As an event's."""
        self.sleep(seconds)
        return self.slept >= self.done_after


@pytest.mark.parametrize("error", [SystemExit(143), RuntimeError("gloo: connection closed by peer")])
def test_while_it_is_stopped_it_does_not_wait(watch, monkeypatch, error):
    verdict = Verdict("rank 0 has died", (0,), 1)
    clock = Clock(2, lambda: setattr(watch, "_verdict", verdict))
    monkeypatch.setattr(rank_watch, "time", clock)
    watch._decided = clock
    assert watch.explains(error) is verdict


def test_the_main_thread_may_be_stopped_while_it_says_why_it_ends(watch, monkeypatch):
    class Ended(BaseException):
        pass

    def ended():
        raise Ended

    monkeypatch.setattr(rank_watch, "time", Clock(5, ended))
    with pytest.raises(Ended):
        watch._conclude(Verdict("", (), 0))


def test_last_words_are_told_by_a_process_that_was_stopped(watch, monkeypatch):
    watch._told = clock = Clock(3, lambda: None)
    monkeypatch.setattr(rank_watch, "time", clock)
    watch.end()
    assert clock.slept == 3


def waited(watch, error):
    """Seconds that the watch gives the others' words after an error."""
    watch.interval = 1.0
    watch._decided = clock = Clock(10**6, lambda: None)
    watch.explains(error)
    return clock.now - 1000 - 3600


def test_after_torch_s_time_out_the_standstill_is_waited_for(watch):
    text = "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 300000ms for recv operation to complete"
    assert waited(watch, RuntimeError(text)) == pytest.approx(0.9 * 300 + 4)
    assert waited(watch, RuntimeError("gloo: connection closed by peer")) == pytest.approx(5 + 4)
    assert waited(watch, SystemExit(143)) == pytest.approx(4)


def test_a_standstill_is_that_of_the_time_in_which_this_process_ran(watch):
    now = time.monotonic()
    watch._exchanged_at = now - 100
    stood = {rank: replace(one, moved_at=now - 360, waits_since=now - 360) for rank, one in watch._seen.items()}
    watch._seen = stood
    watch._leave_out(100.0, now)
    assert watch._exchanged_at == now
    assert {now - one.moved_at for one in watch._seen.values()} == {260.0}


@pytest.mark.parametrize(
    ("told", "seconds"),
    [
        ({"failure": "ValueError: theirs"}, 4.0),
        ({"failure": "was asked to end", "blameless": True}, 0.1),
        ({}, 0.1),
    ],
)
def test_who_is_asked_to_end_hears_of_the_failure_that_it_is_asked_for(watch, told, seconds):
    watch._seen[0] = replace(watch._seen[0], beat=replace(watch._seen[0].beat, ending=True, **told))
    assert waited(watch, SystemExit(143)) == pytest.approx(seconds)


def test_who_is_asked_to_end_tells_that_it_is_no_failure_at_once(watch, monkeypatch):
    told = []
    monkeypatch.setattr(watch, "_wait", lambda _: told.append(watch._now()))
    watch.explains(SystemExit(143))
    assert (told[0].failure, told[0].ending, told[0].blameless) == ("was asked to end", True, True)


@pytest.mark.parametrize("code", [1, 75])
def test_who_ends_for_want_of_another_takes_the_verdict_s_exit_code(watch, code):
    watch._verdict = Verdict("rank 0 has ended", (0,), 1, code)
    with pytest.raises(SystemExit) as caught, ends_told(), ends_told():
        raise RuntimeError("gloo: connection closed by peer")
    assert caught.value.code == code and watch.failure is None


def test_an_error_outside_the_loop_is_told(watch, monkeypatch):
    def broken(*_):
        raise ValueError("no such layer")

    monkeypatch.setattr(pretrain, "check_run", lambda config: None)
    monkeypatch.setattr(pretrain, "_run", broken)
    with pytest.raises(ValueError, match="no such layer"):
        pretrain.pretrain(None)
    assert watch.failure == "ValueError: no such layer"


@pytest.mark.parametrize(
    ("doing", "lost", "waits"), [(SAVING, (), True), (SAVING, (0,), False), ("forward", (), False)]
)
def test_a_checkpoint_may_be_written_to_its_end(watch, monkeypatch, doing, lost, waits):
    def seconds(_):
        slept.append(1)
        watch._seen[0] = replace(watch._seen[0], beat=replace(watch._beat, rank=0, doing="forward"))

    slept = []
    monkeypatch.setattr(rank_watch, "time", SimpleNamespace(sleep=seconds))
    watch._seen[0] = replace(watch._seen[0], beat=replace(watch._beat, rank=0, doing=f"{doing} (file.py:1)"))
    watch._let_save(Verdict("", lost, 1))
    assert bool(slept) == waits


def test_rank_0_stays_until_its_last_words_are_read(watch):
    beat, told = replace(watch._beat, rank=0, machine="elsewhere", count=7), {0: 7}
    assert not watch._knows(beat, told) and not watch._knows(replace(beat, count=8), told)
    for reason in ({"count": 9}, {"ending": True}, {"verdict": Verdict("", (), 0)}):
        assert watch._knows(replace(beat, **reason), told)
