"""Launches that lose a rank: the others end, soon, saying which; nothing stays behind, and the next start goes on."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

pytest.importorskip("composer")

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or torch.cuda.is_available(), reason="looks into /proc; two CPU ranks"
)

ROOT = Path(__file__).parents[2]
TINY_RUN = Path(__file__).with_name("tiny_run.py")
# Seconds for a launch to come to its first steps, or to end by itself, which is what is tested, on a busy machine.
LIMIT = 600

# Composer's, which by itself kills a rank 30 seconds after it asked it to end: it may be stopped for that long.
LAUNCHER = """
import sys
from datetime import timedelta
from composer.cli import launcher

launcher.CLEANUP_TIMEOUT = timedelta(minutes=10)
sys.exit(launcher.main())
"""

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
def launch(master_port):
    """Start two ranks; all that they print goes to `log`. What a failing test leaves of them is killed."""
    launchers = []

    def start(*arguments, log, **more):
        paths = os.pathsep.join(p for p in sys.path if p)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | more
        command = [sys.executable, "-c", LAUNCHER, "-n", "2", "--master_port", str(master_port)]
        before = segments(Path("/dev/shm").iterdir())
        with open(log, "w") as output:
            launcher = subprocess.Popen(
                [*command, *map(str, arguments)], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        launcher.before = before
        launchers.append(launcher)
        return launcher

    yield start
    for launcher in launchers:
        if launcher.poll() is None:
            for process in [*psutil.Process(launcher.pid).children(recursive=True), launcher]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            launcher.wait()


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def wait_for_steps(launcher, folder, steps, log):
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + LIMIT
    while not metrics.exists() or metrics.read_text().count("\n") < steps:
        assert launcher.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def shared_memory(launcher, processes):
    """The segments in /dev/shm that the launch has made: of those that its processes have open or mapped and that were
    not there before, the ones of a number that it has claimed."""
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
    made = segments(found) - launcher.before
    ours = {path.name[:6] for path, _ in made if path.name.endswith("_anymixer")}
    return {(path, inode) for path, inode in made if path.name[:6] in ours}


def watched(launcher, rank):
    """A rank's process, the processes of the launch and their shared memory."""
    processes = psutil.Process(launcher.pid).children(recursive=True)
    (lost,) = [p for p in processes if p.ppid() == launcher.pid and p.environ()["RANK"] == str(rank)]
    files = shared_memory(launcher, processes)
    assert {"locals", "anymixer"} <= {path.name[7:] for path, _ in files}
    return lost, processes, files


def end(launcher, processes):
    """Wait for the end of a launch and of all its processes."""
    code = launcher.wait(LIMIT)
    _, alive = psutil.wait_procs(processes, timeout=LIMIT)
    for process in alive:
        process.kill()
    assert not alive
    return code


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
