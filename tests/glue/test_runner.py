"""Jobs in processes of their own: pinned, tried twice, never run again once finished, and never at once."""

import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from anymixer.errors import UserError
from anymixer.glue import runner as runner_module
from anymixer.glue.graph import build_graph
from anymixer.glue.results import Store
from anymixer.glue.runner import Runner, Slot, find_slots

TWO = [Slot(f"gpu-{i}", "gpu", {"CUDA_VISIBLE_DEVICES": str(i), "OMP_NUM_THREADS": "1"}) for i in (4, 5)]


@pytest.fixture
def sweep(tmp_path, make_settings, facts, fake_command):
    """Run tasks with a behaviour of the fake job; returns outcome, what was said, and the starts so far."""
    store = Store(tmp_path / "run")

    def run(tasks, slots=TWO, time_limit=None, also=None, **behaviour):
        graph = build_graph(make_settings(tasks), facts, {})
        said = []

        def say(line):
            said.append(line)
            if also is not None:
                also(line)

        runner = Runner(store, slots, command=fake_command(**behaviour), say=say, time_limit=time_limit)
        runner.run(graph.nodes, len(graph.nodes))
        starts = [line.split() for line in (tmp_path / "run" / "runs.txt").read_text().splitlines()]
        return runner.outcome, said, starts

    run.store = store
    return run


def test_every_job_runs_once_on_its_device(sweep):
    outcome, said, starts = sweep({"cola": {"seeds": [1, 2, 3]}, "sst2": {}}, seconds=0.2)
    assert len(outcome.finished) == 4 and not outcome.failed
    assert sorted(job for job, *_ in starts) == sorted(outcome.finished)
    assert {gpu for _, gpu, _ in starts} == {"4", "5"} and {threads for *_, threads in starts} == {"1"}
    assert said[-1].startswith("[4/4] ")
    result = next(iter(outcome.finished.values()))
    assert result.spec["device"] == "gpu"
    assert "the job says hello" in sweep.store.log(result.job_id).read_text()
    again, said, later = sweep({"cola": {"seeds": [1, 2, 3]}, "sst2": {}})
    assert (again.finished, said, later) == (outcome.finished, [], starts)


def test_stage_two_gets_the_checkpoint_of_stage_one(sweep):
    outcome, _, starts = sweep({"rte": {"seeds": [5, 6]}, "mnli": {"seeds": [5, 6]}})
    order = [job for job, *_ in starts]
    assert sorted(job.split("-")[0] for job in order) == ["mnli", "mnli", "rte", "rte"]
    for result in outcome.finished.values():
        if result.task == "rte":
            mnli = result.spec["starting_point"].removeprefix("job:")
            assert order.index(mnli) < order.index(result.job_id)
            assert result.starting == str((sweep.store.job_folder(mnli) / "checkpoint").resolve())
            assert outcome.finished[mnli].seed == result.seed


def test_a_job_that_fails_twice_is_named_and_the_rest_goes_on(sweep):
    tasks = {"cola": {}, "mnli": {}, "rte": {}, "sst2": {}}
    outcome, said, starts = sweep(tasks, fail=["mnli"])
    assert sorted(result.task for result in outcome.finished.values()) == ["cola", "sst2"]
    mnli, rte = sorted(outcome.failed, key=lambda job: job.startswith("rte"))
    assert [job for job, *_ in starts].count(mnli) == 2 and rte not in [job for job, *_ in starts]
    assert outcome.failed[mnli] == "exit code 1: RuntimeError: out of memory"
    assert outcome.failed[rte] == f"not started: it needs {mnli}, which failed"
    failure = sweep.store.failure(mnli)
    assert (failure.attempts, failure.task) == (2, "mnli") and failure.log_end[0] == "the job says hello"
    assert failure.log_end[-1] == "RuntimeError: out of memory"
    assert any("trying once more" in line for line in said)
    later, _, all_starts = sweep(tasks)
    assert len(later.finished) == 4 and not later.failed
    assert sorted(job for job, *_ in all_starts[len(starts) :]) == sorted([mnli, rte])
    assert sweep.store.failure(mnli) is None and sweep.store.failure(rte) is None


class Clock:
    """Stands for the module `time`: an hour passes whenever a job has begun to hang, and none otherwise."""

    strftime = staticmethod(time.strftime)

    def __init__(self, run):
        self.run, self.hours = run, 0

    def sleep(self, seconds):
        logs = self.run.glob("jobs/cola-*/log.txt")
        self.hours = sum(log.read_text().count("the job says hello") for log in logs)
        time.sleep(seconds)

    def monotonic(self):
        return 3600.0 * self.hours


def test_a_job_that_hangs_is_killed_and_the_rest_goes_on(sweep, monkeypatch):
    monkeypatch.setattr(runner_module, "time", Clock(sweep.store.folder))
    outcome, said, starts = sweep({"cola": {}, "sst2": {}}, slots=TWO[:1], time_limit=2, hang=["cola"])
    assert [result.task for result in outcome.finished.values()] == ["sst2"] and len(starts) == 3
    assert list(outcome.failed.values()) == ["took longer than job_time_limit = 2 s"]
    assert any("trying once more" in line for line in said)


def test_a_mistake_is_not_tried_again(sweep):
    outcome, _, starts = sweep({"cola": {}}, mistake=["cola"])
    assert list(outcome.failed.values()) == ["exit code 2: error: lr: is a mistake"] and len(starts) == 1


def test_a_job_that_is_killed_once_finishes(sweep, fake_job):
    *unfinished, finished = fake_job.DEATHS
    for number, moment in enumerate(unfinished):
        outcome, said, starts = sweep({"cola": {"seeds": [number]}}, die={f"cola-seed{number}": moment})
        assert len(outcome.finished) == 1 and len(starts) == 2 * number + 2
        assert "killed by SIGKILL" in said[1]
    outcome, said, later = sweep({"cola": {"seeds": [3]}}, die={"cola-seed3": finished})
    assert len(outcome.finished) == 1 and len(later) == len(starts) + 1 and len(said) == 2


def test_a_checkpoint_that_is_gone_fails_what_needs_it(sweep):
    outcome, *_ = sweep({"mnli": {}})
    (mnli,) = outcome.finished
    (sweep.store.job_folder(mnli) / "checkpoint").rmdir()
    outcome, *_ = sweep({"mnli": {}, "rte": {}})
    assert next(iter(outcome.failed.values())).endswith("is gone; move that folder away to train it again")


def test_a_process_of_an_earlier_start_is_waited_for(sweep, make_settings, facts):
    node = build_graph(make_settings({"cola": {}}), facts, {}).nodes[0]
    lock = sweep.store.job_folder(node.job_id) / "lock"
    lock.parent.mkdir(parents=True)
    code = f"import fcntl; f = open({str(lock)!r}, 'w'); fcntl.flock(f, 2); print('held', flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdout.readline() == "held\n"

        def end(line):
            if process.poll() is None:
                process.communicate("\n", timeout=300)

        outcome, said, starts = sweep({"cola": {}}, also=end)
    assert said[0] == f"{node.job_id}: in use by a process of an earlier start; waiting for its end"
    assert said[1].startswith(f"{node.job_id}: started on") and len(starts) == 1
    assert list(outcome.finished) == [node.job_id]


def test_a_damaged_result_is_named(sweep):
    outcome, *_ = sweep({"cola": {}})
    (job,) = outcome.finished
    (sweep.store.job_folder(job) / "result.json").write_text(json.dumps({"job_id": job}))
    with pytest.raises(UserError, match=r"result\.json: is no whole result"):
        sweep({"cola": {}})


def test_ctrl_c_ends_the_jobs(tmp_path, sweep, monkeypatch):
    def interrupt(seconds):
        time.sleep(seconds)
        running = list((tmp_path / "run").glob("jobs/*/log.txt"))
        if running and "hello" in running[0].read_text():
            monkeypatch.undo()
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(runner_module, "time", SimpleNamespace(**vars(time) | {"sleep": interrupt}))
    with pytest.raises(KeyboardInterrupt):
        sweep({"cola": {}}, seconds=600)
    (job,) = (tmp_path / "run" / "jobs").iterdir()
    assert sorted(path.name for path in job.iterdir()) == ["lock", "log.txt", "spec.json"]
    assert runner_module.try_lock(job / "lock") is not None


def test_slots_are_the_gpus_or_share_the_cores(monkeypatch):
    monkeypatch.setattr(runner_module.os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr(runner_module, "visible_gpus", lambda: ["2", "7"])
    slots = find_slots(None, None, 10)
    assert [(s.name, s.device, s.environment["CUDA_VISIBLE_DEVICES"]) for s in slots] == [
        ("gpu-2", "gpu", "2"),
        ("gpu-7", "gpu", "7"),
    ]
    assert [s.name for s in find_slots(None, 3, 10)] == ["gpu-2", "gpu-7", "gpu-2-1"]
    assert [s.name for s in find_slots(None, None, 1)] == ["gpu-2"]
    assert [s.environment["OMP_NUM_THREADS"] for s in find_slots("cpu", None, 3)] == ["2", "2", "2"]
    assert [s.environment["OMP_NUM_THREADS"] for s in find_slots("cpu", 1, 3)] == ["8"]
    assert find_slots("cpu", None, 3)[0].environment["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setattr(runner_module, "visible_gpus", list)
    assert [s.name for s in find_slots(None, None, 20)] == [f"cpu-{i}" for i in range(8)]
    with pytest.raises(UserError, match="device: gpu"):
        find_slots("gpu", None, 1)


def test_visible_gpus_keep_the_names_they_have(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert runner_module.visible_gpus() == ["3", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert runner_module.visible_gpus() == ["0", "1"]
