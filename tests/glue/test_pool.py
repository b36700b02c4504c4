"""Two devices and more jobs: none waits while a device is idle, whatever the others still do."""

import json
import sys
import textwrap

import pytest

from anymixer.glue.graph import build_graph
from anymixer.glue.results import Store
from anymixer.glue.runner import Runner, Slot

TWO = [Slot(f"gpu-{i}", "gpu", {"CUDA_VISIBLE_DEVICES": str(i), "OMP_NUM_THREADS": "1"}) for i in range(2)]
# The fake job, which first waits for the file that is named for its task.
HELD = """
    import json, os, runpy, sys, time
    from pathlib import Path
    task = json.loads(Path(sys.argv[2]).read_text())["task"]
    held = json.loads(os.environ["HELD"]).get(task)
    for _ in range(6000):
        if held is None or Path(held).exists():
            break
        time.sleep(0.1)
    else:
        sys.exit("held for ten minutes: a device was idle")
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def two_devices(tmp_path, make_settings, facts, fake_command, monkeypatch):
    """Run tasks on two devices; a task that is `held` runs until a line that begins with what is given is said."""
    script = tmp_path / "held_job.py"
    script.write_text(textwrap.dedent(HELD))

    def run(tasks, held, **settings):
        files = {task: tmp_path / f"go-{task}" for task in held}
        monkeypatch.setenv("HELD", json.dumps({task: str(file) for task, file in files.items()}))
        fake = fake_command()[-1]
        settings = make_settings(tasks, **settings)
        said = []

        def say(line):
            said.append(line)
            for task, beginning in held.items():
                if line.startswith(beginning) and ": started on" in line:
                    files[task].touch()

        def grow(scores):
            return build_graph(settings, facts, scores).nodes

        runner = Runner(Store(tmp_path / "run"), TWO, command=[sys.executable, str(script), fake], say=say)
        runner.run(build_graph(settings, facts, {}).nodes, 9, grow)
        assert not runner.outcome.failed, runner.outcome.failed
        return [result.task for result in runner.outcome.finished.values()]

    return run


def test_short_jobs_pass_a_long_one(two_devices):
    """QQP holds its device until the last of the seeds of CoLA has started on the other."""
    finished = two_devices({"qqp": {"seeds": [1]}, "cola": {"seeds": [1, 2, 3, 4]}}, {"qqp": "cola-seed4"})
    assert finished[:3] == ["cola"] * 3 and sorted(finished) == ["cola"] * 4 + ["qqp"]


def test_a_job_that_waits_for_a_checkpoint_lets_others_pass(two_devices):
    """RTE waits for MNLI, which holds its device until SST-2 has started on the other."""
    finished = two_devices({"mnli": {"seeds": [1]}, "rte": {"seeds": [1]}, "sst2": {"seeds": [1]}}, {"mnli": "sst2"})
    assert sorted(finished) == ["mnli", "rte", "sst2"] and finished.index("mnli") < finished.index("rte")


def test_what_a_grid_chooses_starts_while_others_still_run(two_devices):
    """RTE starts from the better of MNLI's two jobs; QQP holds its device until it has."""
    tasks = {"mnli": {"sweep": {"lr": [1e-5, 3e-5]}, "seeds": [1]}, "qqp": {"seeds": [1]}, "rte": {"seeds": [1]}}
    finished = two_devices(tasks, {"qqp": "rte"})
    assert sorted(finished) == ["mnli", "mnli", "qqp", "rte"] and finished.index("rte") >= 2
