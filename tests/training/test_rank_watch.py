"""Launches that lose a rank: the others end, soon, saying which; nothing stays behind, and the next start goes on."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from torch.distributed import TCPStore

pytest.importorskip("composer")

from anymixer import pretrain
from anymixer.training import rank_watch
from anymixer.training.rank_verdict import Seen, Verdict
from anymixer.training.rank_watch import _condition, ends_told
from anymixer.training.whereabouts import SAVING

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or torch.cuda.is_available(), reason="looks into /proc; two CPU ranks"
)

ROOT = Path(__file__).parents[2]
TINY_RUN = Path(__file__).with_name("tiny_run.py")
# Seconds for a launch to come to its first steps, or to end by itself, which is what is tested, on a busy machine.
LIMIT = 600


# Hydra, which waits in the 16th step of rank 1 until the file $HELD goes, and kills it: a step passes two layers.
MORTAL = """
import os, signal, time
from pathlib import Path
from anymixer.mixers import register_mixer
from anymixer.mixers.hydra import Hydra

@register_mixer("mortal")
class Mortal(Hydra):
    passes = 0
    def forward(self, hidden_states, packing=None):
        Mortal.passes += self.training
        if Mortal.passes == 31 and os.environ["RANK"] == "1" and "HELD" in os.environ:
            while Path(os.environ["HELD"]).exists():
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(hidden_states, packing)
"""


def segments(paths):
    """Those of the paths that exist, each with its inode: a name that is free again may be another test's the next
    moment."""
    found = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            found[path] = path.stat().st_ino
    return found.items()


@pytest.fixture
def launch(master_port, tiny_corpus):
    """Start two ranks; all that they print goes to `log`."""

    def start(*arguments, log, **more):
        paths = os.pathsep.join(p for p in sys.path if p)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | more
        command = [sys.executable, "-m", "composer", "-n", "2", "--master_port", str(master_port)]
        before = segments(Path("/dev/shm").iterdir())
        with open(log, "w") as output:
            launcher = subprocess.Popen(
                [*command, *map(str, arguments)], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        launcher.before, launcher.data = before, tiny_corpus
        return launcher

    return start


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def wait_for_steps(launcher, folder, steps, log):
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + LIMIT
    while not metrics.exists() or metrics.read_text().count("\n") < steps:
        assert launcher.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def content(segment):
    with contextlib.suppress(FileNotFoundError):
        return segment.read_bytes()
    return b""


def shared_memory(launcher, processes):
    """The segments in /dev/shm that the launch has made: those that its processes have open or mapped and that were not
    there before, of data whose path no other test has. All of streaming's start with one number."""
    found = set()
    for process in processes:
        links = [*Path(f"/proc/{process.pid}/fd").iterdir(), *Path(f"/proc/{process.pid}/map_files").iterdir()]
        for link in links:
            try:
                target = os.readlink(link)
            except OSError:  # closed since
                continue
            if target.startswith("/dev/shm/") and "(deleted)" not in target:
                found.add(Path(target))
    data = str(launcher.data).encode()
    made = segments(found) - launcher.before
    ours = {path.name[:6] for path, _ in made if "_locals" in path.name and data in content(path)}
    return {(path, inode) for path, inode in made if path.name[:6] in ours}


def watched(launcher, rank):
    """A rank's process, the processes of the launch and their shared memory."""
    processes = psutil.Process(launcher.pid).children(recursive=True)
    (lost,) = [p for p in processes if p.ppid() == launcher.pid and p.environ()["RANK"] == str(rank)]
    files = shared_memory(launcher, processes)
    assert {"locals", "anymixer"} <= {path.name[7:] for path, _ in files}
    return lost, processes, files


def end(launcher, processes):
    """Wait for the end of a launch and of all its processes; whatever a failing test leaves is killed."""
    try:
        code = launcher.wait(LIMIT)
        _, alive = psutil.wait_procs(processes, timeout=60)
        assert not alive
        return code
    finally:
        for process in [*processes, launcher]:
            if isinstance(process, subprocess.Popen) or process.is_running():
                process.kill()
        launcher.wait()


@pytest.mark.slow
def test_a_killed_rank_ends_the_launch_and_the_next_start_ends_in_the_same_losses(write_run, launch, tmp_path):
    (tmp_path / "mortal.py").write_text(MORTAL)
    options = {"max_duration": "30ba", "save_interval": "10ba", "eval_first": "false"}
    options["mixer"] = f"{{name: mortal, module: {tmp_path}/mortal.py, d_state: 4, headdim: 8}}"
    options["train_loader"] = "{num_workers: 1}"
    whole, broken = (write_run(tmp_path, name, **options) for name in ("whole", "broken"))
    log = tmp_path / "log.txt"
    assert launch("main.py", whole, log=log).wait(LIMIT) == 0, log.read_text()

    held = tmp_path / "held"
    held.touch()
    launcher = launch("main.py", broken, log=log, HELD=str(held))
    wait_for_steps(launcher, tmp_path / "broken", 15, log)
    lost, processes, files = watched(launcher, 1)
    held.unlink()
    assert end(launcher, processes) != 0
    output = log.read_text()
    assert f"error: rank 1 (process {lost.pid} on " in output and ") has died; last seen in step " in output
    assert output.count("error: ") == 1 and "Traceback" not in output
    assert "start the same command again to continue from the last checkpoint" in output
    assert not files & segments(path for path, _ in files)

    assert launch("main.py", broken, log=log).wait(LIMIT) == 0, log.read_text()
    assert "continuing from" in log.read_text()
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 30


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_stopped_is_found(write_run, launch, tmp_path, rank):
    options = {"max_duration": "10000ba", "save_interval": "1000ba", "eval_first": "false", "rank_timeout": 20}
    log = tmp_path / "log.txt"
    launcher = launch("main.py", write_run(tmp_path, "run", **options), log=log)
    wait_for_steps(launcher, tmp_path / "run", 3, log)
    lost, processes, files = watched(launcher, rank)
    lost.suspend()
    assert end(launcher, processes) != 0
    output = log.read_text()
    assert f"error: rank {rank} (process {lost.pid} on " in output and "(the process is stopped)" in output
    assert "waiting for the other ranks, in " in output or "backward and its exchange of gradients" in output
    assert output.count("error: ") == 1 and "Traceback" not in output
    assert not files & segments(path for path, _ in files)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "message", "code"),
    [
        ("hang", "has kept the others waiting for 54 s; last seen in step 4: waiting for a batch from the data", 75),
        ("fail", "has failed (ValueError: rank 1 finds a fault); last seen in step ", 1),
    ],
)
def test_a_rank_that_hangs_or_fails_is_named_by_the_other(launch, tmp_path, option, message, code):
    run = {"config": {"dist_timeout": 60}, "options": {option: {"rank": 1, "step": 3}}, "out": str(tmp_path / "out")}
    log = tmp_path / "log.txt"
    launcher = launch(TINY_RUN, json.dumps([run]), log=log)
    deadline = time.monotonic() + LIMIT
    while not (tmp_path / "out").exists():
        assert launcher.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    processes = psutil.Process(launcher.pid).children(recursive=True)
    assert end(launcher, processes) == code
    output = log.read_text()
    assert message in output and "error: rank 1 (process " in output
    assert ("Start the same command again" in output) == (code == 75)


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
    assert _condition(watch._beat, watch._beat) == "running"
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: boot + 100.0)
    assert _condition(watch._beat, watch._beat) == "running"
    assert _condition(watch._beat, replace(watch._beat, born=watch._beat.born - 100)) == "gone"


def test_machines_of_one_name_are_told_apart(watch, monkeypatch):
    assert socket.gethostname() not in watch._beat.machine
    assert Path("/proc/sys/kernel/random/boot_id").read_text().strip() in watch._beat.machine
    assert _condition(watch._beat, replace(watch._beat, machine="elsewhere", pid=2**22)) is None


def test_a_process_that_may_not_be_looked_at_is_not_known(watch, monkeypatch):
    def denied(self):
        raise psutil.AccessDenied(self.pid)

    monkeypatch.setattr(psutil.Process, "status", denied)
    assert _condition(watch._beat, watch._beat) is None


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
    deadline = time.monotonic() + 20
    while watch._store is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert watch._store is None
    store = TCPStore("127.0.0.1", master_port, is_master=True, wait_for_workers=False)
    beats(store, watch)
    began = time.monotonic()
    while watch._exchanged_at < began and time.monotonic() < deadline:
        time.sleep(0.05)
    assert watch._exchanged_at > began and watch._verdict is None
    watch._leaving.set()
    for thread in watch._threads:
        thread.join(30)


def test_a_store_that_ends_is_missed_after_a_while_or_at_once_with_its_process(watch, monkeypatch):
    now = time.monotonic()
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
    monkeypatch.setattr(rank_watch.time, "sleep", seconds)
    watch._seen[0] = replace(watch._seen[0], beat=replace(watch._beat, rank=0, doing=f"{doing} (file.py:1)"))
    watch._let_save(Verdict("", lost, 1))
    assert bool(slept) == waits


def test_rank_0_stays_until_its_last_words_are_read(watch):
    beat, told = replace(watch._beat, rank=0, machine="elsewhere", count=7), {0: 7}
    assert not watch._knows(beat, told) and not watch._knows(replace(beat, count=8), told)
    for reason in ({"count": 9}, {"ending": True}, {"verdict": Verdict("", (), 0)}):
        assert watch._knows(replace(beat, **reason), told)
