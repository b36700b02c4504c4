"""`glue.py` as its users start it: mistakes, the graph, jobs that are killed, starting again, the report."""

import contextlib
import importlib.util
import itertools
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anymixer import finetune
from anymixer.config import GlueConfig, load_config
from anymixer.entry_point import run
from anymixer.errors import UserError

ROOT = Path(__file__).parents[2]
GLUE = """\
base_run_name: tiny
from_scratch: true
data_local: {data}
tokenizer_name: {tokenizer}
save_finetune_checkpoint_folder: {folder}
max_seq_len: 32
device: cpu
model:
  mixer: {{name: attention, num_heads: 2}}
  model_config: {{vocab_size: 32, hidden_size: 16, num_hidden_layers: 2, hidden_dropout_prob: 0.0}}
tasks:
"""
TASK = "  {name}: {{seeds: {seeds}, trainer_kwargs: {{lr: {lr}, weight_decay: 0.0, batch_size: 16, " + (
    "max_duration: 4ba, eval_interval: 2ba}}}}\n"
)


@pytest.fixture
def write_glue(tmp_path, data, tokenizer_folder):
    """Write the YAML file of a run whose results go to `run` beside it; tasks are (name, seeds, learning rate)."""

    def write(*tasks):
        text = GLUE.format(data=data, tokenizer=tokenizer_folder, folder=tmp_path / "run")
        text += "".join(TASK.format(name=name, seeds=seeds, lr=lr) for name, seeds, lr in tasks)
        (tmp_path / "tiny.yaml").write_text(text)
        return tmp_path / "tiny.yaml"

    return write


@pytest.fixture(scope="session")
def call_glue():
    """glue.py in this process: call with its arguments, get its exit code."""
    spec = importlib.util.spec_from_file_location("glue_under_test", ROOT / "glue.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: run(module.main, [str(a) for a in arguments])


@pytest.fixture
def start_glue(child_environment, monkeypatch):
    """Start glue.py in a process of its own, whose lines come as they are printed."""
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = []

    def start(*arguments):
        command = [sys.executable, str(ROOT / "glue.py"), *map(str, arguments)]
        started.append(subprocess.Popen(command, cwd=ROOT, **pipes))
        return started[-1]

    yield start
    for process in started:
        with process:
            process.terminate()  # it ends its jobs


def attempts(folder):
    """Job id -> how often it has been started."""
    return {log.parent.name: log.read_text().count(", attempt ") for log in folder.glob("jobs/*/log.txt")}


def processes(folder):
    """How many processes of a run's jobs live now."""
    found = 0
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = entry.read_bytes().decode(errors="replace").split("\0")
            found += any(word.startswith(f"{folder}/jobs/") for word in words)
    return found


def check_chaos(folder, killed, jobs):
    """All but one have results, the failure is named, and those that were killed were started once more."""
    results = {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("jobs/*/result.json")}
    failures = [json.loads(path.read_text()) for path in folder.glob("jobs/*/failure.json")]
    assert len(results) == jobs - 1
    assert [failure["task"] for failure in failures] == ["stsb"] and failures[0]["attempts"] == 2
    starts = attempts(folder)
    assert starts.pop(failures[0]["job_id"]) == 2
    assert {job.rpartition("-")[0] for job, count in starts.items() if count == 2} == set(killed)
    assert set(starts.values()) == {1, 2}
    return failures[0]["job_id"], results


def test_twelve_jobs_three_killed_and_one_that_always_fails(tmp_path, write_glue, fake_job, fake_command, capsys):
    file = write_glue(("cola", list(range(6)), 1e-3), ("rte", list(range(5)), 1e-3), ("stsb", [1], 1e-3))
    config, folder = load_config(file, schema=GlueConfig), tmp_path / "run"
    dice = random.Random(4)
    killed = dice.sample([f"cola-seed{i}" for i in range(6)] + [f"rte-seed{i}" for i in range(5)], 3)
    die = {job: dice.choice(fake_job.DEATHS[:-1]) for job in killed}
    with pytest.raises(UserError, match=r"1 of 12 jobs failed: stsb-seed1-\w+; the same command runs only these again"):
        finetune.finetune(config, command=fake_command(seconds=0.3, fail=["stsb"], die=die))
    failed, results = check_chaos(folder, killed, 12)
    assert "stsb (exit code 1: RuntimeError: out of memory)" in (folder / "report.md").read_text()
    before = attempts(folder)
    capsys.readouterr()
    finetune.finetune(config, command=fake_command())
    assert attempts(folder) == before | {failed: before[failed] + 1}
    after = {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("jobs/*/result.json")}
    assert {job: after[job] for job in results} == results and len(after) == 12
    assert "12 jobs, 11 finished before" in capsys.readouterr().out
    finetune.finetune(config, command=fake_command())
    assert attempts(folder) == before | {failed: before[failed] + 1}


def test_a_grid_chooses_and_the_other_seeds_follow(tmp_path, write_glue, fake_command):
    file = write_glue(("cola", [0, 1, 2], 1e-3))
    overrides = ["sweep.lr=[1e-5,3e-5,5e-5]", "sweep_seeds=1"]
    config = load_config(file, overrides, schema=GlueConfig)
    finetune.finetune(config, command=fake_command())
    assert len(attempts(tmp_path / "run")) == 5
    values = json.loads((tmp_path / "run" / "report.json").read_text())
    (cola,) = values["tasks"]
    assert (cola["point"], cola["n"], len(values["tried"])) == ({"lr": 3e-5}, 3, 2)
    assert [job["spec"]["lr"] for job in cola["results"]] == [3e-5] * 3
    finetune.finetune(config, command=fake_command(fail=["cola"]))
    assert set(attempts(tmp_path / "run").values()) == {1}


def test_the_graph_is_printed_and_nothing_runs(tmp_path, write_glue, call_glue, capsys):
    file = write_glue(("cola", [1, 2], 1e-3), ("qnli", [1], 1e-3))
    assert call_glue(file, "--dry-run") == 0
    out = capsys.readouterr().out
    assert out.count("cola-seed") == 2 and "random weights" in out and "2 jobs" in out
    assert "qnli: left out: no train split in" in out
    assert not (tmp_path / "run").exists()


def test_a_report_needs_neither_data_nor_checkpoints(tmp_path, write_glue, fake_command, call_glue, capsys):
    file = write_glue(("cola", [1, 2], 1e-3), ("qnli", [1], 1e-3))
    assert call_glue(file, "--report") == 2
    assert "holds no results" in capsys.readouterr().err
    finetune.finetune(load_config(file, schema=GlueConfig), command=fake_command())
    made = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("report.*")}
    assert "qnli: left out: no train split" in capsys.readouterr().out
    for name in made:
        (tmp_path / "run" / name).unlink()
    assert call_glue(file, "data_local=/nowhere", "--report") == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").glob("report.*")} == made
    out = capsys.readouterr().out
    assert "qnli (no train split" in out and "learning_curves.png" in out and "submission.zip lacks" in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["data_local=/nowhere"], "data_local: no such folder: /nowhere"),
        (["max_seq_len=4"], "tasks.cola: max_sequence_length: 4"),
        (["model.model_config.vocab_size=8"], "tokenizer_name: has 25 tokens"),
        (["from_scratch=false", "starting_checkpoint_load_path=/nowhere"], "load_path: no such file or folder: /now"),
        (["callbacks.lr_monitr={}"], "callbacks.lr_monitr"),
        (["algorithms.alibi={}"], "algorithms.alibi: set it in the model instead"),
        (["tokenizer_name=null"], "tokenizer_name: not set"),
        (["device=gpu"], "device: gpu, but torch sees no CUDA device"),
        (["precision=amp_bf16"], "precision: amp_bf16 needs a GPU"),
        (["save_finetune_checkpoint_folder=/dev/null/x"], "_folder: /dev/null is a file; name a folder"),
    ],
)
def test_mistakes_are_found_before_any_job(tmp_path, write_glue, call_glue, capsys, more, message):
    import torch

    if torch.cuda.is_available() and more == ["device=gpu"]:
        pytest.skip("this machine has what the option asks for")
    assert call_glue(write_glue(("cola", [1], 1e-3)), *more) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "run" / "jobs").exists()


def test_many_ranks_are_refused(write_glue, call_glue, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert call_glue(write_glue(("cola", [1], 1e-3))) == 2
    assert "start it with python, not with composer" in capsys.readouterr().err


# Attention, which kills the jobs of FATE once, in the pass that stands there: a step passes two layers.
MORTAL = """
import contextlib, os, signal, sys
from pathlib import Path
from anymixer.mixers import register_mixer
from anymixer.mixers.attention import Attention

FATE = {fate}

@register_mixer("mortal")
class Mortal(Attention):
    passes = 0
    def forward(self, hidden_states, packing=None):
        Mortal.passes += self.training
        job = Path(sys.argv[-1]).name.rpartition("-")[0]
        if Mortal.passes == FATE.get(job):
            with contextlib.suppress(FileExistsError), open(f"{{__file__}}.{{job}}", "x"):
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(hidden_states, packing)
"""


@pytest.mark.slow
def test_twelve_real_jobs_three_killed_and_one_whose_loss_is_none(tmp_path, write_glue, start_glue):
    """The same with jobs that train; one has a learning rate that makes its loss infinite."""
    file = write_glue(("cola", list(range(6)), 1e-3), ("rte", list(range(5)), 1e-3), ("stsb", [1], 1e30))
    dice, folder = random.Random(5), tmp_path / "run"
    killed = dice.sample([f"cola-seed{i}" for i in range(6)] + [f"rte-seed{i}" for i in range(5)], 3)
    (tmp_path / "mortal.py").write_text(MORTAL.format(fate={job: dice.randint(1, 8) for job in killed}))
    command = [file, f"model.mixer={{name: mortal, num_heads: 2, module: {tmp_path}/mortal.py}}"]
    process = start_glue(*command)
    output, _ = process.communicate(timeout=1800)
    assert process.returncode == 2, output
    failed, results = check_chaos(folder, killed, 12)
    assert f"error: 1 of 12 jobs failed: {failed}" in output and "the loss is" in output
    before = attempts(folder)
    again = start_glue(*command)
    output, _ = again.communicate(timeout=600)
    assert again.returncode == 2 and "12 jobs, 11 finished before" in output, output
    assert attempts(folder) == before | {failed: before[failed] + 2}
    assert {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("jobs/*/result.json")} == results


@pytest.mark.slow
def test_ctrl_c_ends_the_jobs_and_the_same_command_goes_on(tmp_path, write_glue, start_glue):
    file, folder = write_glue(("cola", [0, 1], 1e-3)), tmp_path / "run"
    process = start_glue(file)
    before = list(itertools.takewhile(lambda line: "started on" not in line, process.stdout))
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 130 and "start the same command again to run the rest" in output, [*before, output]
    deadline = time.monotonic() + 600
    while processes(folder) and time.monotonic() < deadline:  # the jobs have ended, and their workers are told to
        time.sleep(0.1)
    assert not processes(folder)
    again = start_glue(file)
    output, _ = again.communicate(timeout=600)
    assert again.returncode == 0, output
    assert len(list(folder.glob("jobs/*/result.json"))) == 2 and "cola" in (folder / "report.md").read_text()
